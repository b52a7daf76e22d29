"""Rewards: the extension point, its built-in kinds, and the weighted mean of the configured terms."""
