"""The learner: from groups of episodes to weights. Knows the contracts of replay and inference, imports neither."""
