"""Tasks in OSWorld's format: parsing, task lists, requirements, setup, evaluation and noisy variants."""
