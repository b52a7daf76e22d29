"""Environments of Gymnasium and OpenEnv as desktops: the screen is their image, and actions are mapped to theirs."""
