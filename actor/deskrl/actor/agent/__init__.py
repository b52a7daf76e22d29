"""Who decides what is done next: the policy and its prompts, or a scripted solution. Knows no desktop."""
