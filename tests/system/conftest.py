"""Fixtures of the system tests, defined in tests/kit."""

from desktop_kit import run_root

__all__ = ["run_root"]
