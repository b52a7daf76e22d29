"""Inference: a batched vLLM engine behind `Act`, and the receiving end of weight updates. Knows no desktop."""
