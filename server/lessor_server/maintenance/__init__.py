"""What the leader does besides planning, and what keeps the store in order."""
