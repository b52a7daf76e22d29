"""The agent: prompts, action language and policies (served, external or scripted)."""
