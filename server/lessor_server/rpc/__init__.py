"""The contract's services over gRPC: validation, errors, and thin servicers."""
