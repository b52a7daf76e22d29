"""From episodes to tensors: rows, screenshots, micro-batches. Knows no loss."""
