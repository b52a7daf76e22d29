"""Model architectures, and the checks of a model folder before anything is started."""
