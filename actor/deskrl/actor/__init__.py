"""The actor: owns desktops, plays episodes on them and streams what happened. Knows no model and no gradient."""
