"""Fixtures of the contract tests: real processes, defined in tests/kit."""

from replay_kit import start_replay

__all__ = ["start_replay"]
