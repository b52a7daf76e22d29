"""The policy network and the engine that trains it: built, loaded, run, saved. Knows no episode."""
