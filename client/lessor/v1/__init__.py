"""Generated from proto/lessor/v1; never edited."""
