"""The agent's side of the lease protocol, without I/O: what happened and the time go in, actions come out."""
