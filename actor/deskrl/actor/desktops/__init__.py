"""Desktops and their providers. Each provider knows how one kind of desktop lives; none knows tasks or policies."""
