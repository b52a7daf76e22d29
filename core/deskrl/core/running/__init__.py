"""A whole run on this machine: what is refused, started, watched, shown and judged."""
