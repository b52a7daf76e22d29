"""Fixtures of the system tests: those of tests/kit, and one that forgets the run of a command called in-process."""

from collections.abc import Iterator

import pytest
from desktop_kit import config, provider, run_root
from docker_kit import docker_address
from replay_kit import start_replay

from deskrl.core import rpc

__all__ = ["config", "docker_address", "provider", "run_root", "start_replay"]


@pytest.fixture(autouse=True)
def forget_the_run() -> Iterator[None]:
    yield
    rpc.set_run(None)
