"""Who runs what, where: pure functions from a snapshot of the fleet and the queues to grants and reasons."""
