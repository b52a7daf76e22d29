"""Learner: trains the policy on groups of episodes and publishes its weights to the inference replicas."""
