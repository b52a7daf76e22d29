"""Fixtures of the long tests, defined in tests/kit."""

from __future__ import annotations

from replay_kit import start_replay

__all__ = ["start_replay"]
