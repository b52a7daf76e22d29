"""Weights on their way to replicas: announced, sent, proven. Knows nothing of what they were learnt from."""
