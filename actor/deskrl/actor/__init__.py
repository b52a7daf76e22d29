"""The actor role: runs episodes on desktops and streams them to the replay service."""
