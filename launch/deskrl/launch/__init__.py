"""One run on this machine: checked, sized, started, supervised, shown and judged."""
