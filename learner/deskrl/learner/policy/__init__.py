"""Policy network: construction, loading, forward pass, and training with DeepSpeed."""
