"""Requirements of a run computed from its configuration: batch sizes, model shape, GPU memory and disk."""
