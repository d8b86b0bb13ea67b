"""What jobs are and what may happen to them. Pure: no I/O, no clock, no generated code."""
