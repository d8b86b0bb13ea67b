"""A model of the lease protocol, small enough that every state it can reach is looked at."""
