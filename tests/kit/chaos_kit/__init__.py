"""Faults to a running job, from a seed: what is done, to what job, and what must be true afterwards."""
