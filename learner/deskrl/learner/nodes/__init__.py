"""A learner on several machines: how its nodes find one another, agree on what they run, and notice lost nodes."""
