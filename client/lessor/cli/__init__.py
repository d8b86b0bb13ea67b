"""The command line: ``lessor``."""
