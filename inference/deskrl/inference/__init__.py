"""Inference role: serves `Act` from a batched vLLM engine and receives weight updates from the learner."""
