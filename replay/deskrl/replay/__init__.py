"""Replay service: leases of rollouts, a durable store of episodes, assembly of groups, and the success buffer."""
