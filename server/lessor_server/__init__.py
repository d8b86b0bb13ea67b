"""The Lessor server: holds all job state in Postgres and leases GPUs to jobs."""
