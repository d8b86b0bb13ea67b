"""The Lessor agent: runs leased jobs on a GPU host."""
