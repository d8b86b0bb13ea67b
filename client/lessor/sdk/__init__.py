"""The Python SDK. Its names are those of the package ``lessor``; import them from there."""
