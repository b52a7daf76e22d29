"""Desktops and their providers."""
