"""Fixtures of the system tests, defined in tests/kit."""

from desktop_kit import run_root
from replay_kit import start_replay

__all__ = ["run_root", "start_replay"]
