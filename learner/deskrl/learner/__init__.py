"""The learner: advantages, losses, the DeepSpeed engine, checkpoints and weight publishing. Knows no desktop."""
