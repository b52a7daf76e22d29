"""Fixtures of the system tests, defined in tests/kit."""

from desktop_kit import run_root
from docker_kit import docker_address
from replay_kit import start_replay

__all__ = ["docker_address", "run_root", "start_replay"]
