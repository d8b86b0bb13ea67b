"""What the server does, behind the RPCs and the agent streams."""
