"""Tasks in OSWorld's format: found, checked, set up, judged, varied. Knows no policy."""
