"""The scenarios, one module each: ``TITLE``, ``QUICK`` (part of the quick run) and ``run(bench) -> Result``."""
