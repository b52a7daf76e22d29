"""Replay: leases, the durable episode store, group assembly and the success cache. Knows no tensor."""
