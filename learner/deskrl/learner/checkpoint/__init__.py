"""Checkpoints: written in the background, committed to the replay service, restored and verified."""
