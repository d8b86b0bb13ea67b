"""The store: all state, in Postgres. Contended statements are the files of ``sql/``."""
