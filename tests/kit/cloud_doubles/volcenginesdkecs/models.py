"""Requests: records of their arguments."""

from types import SimpleNamespace
from typing import Any


def __getattr__(name: str) -> Any:
    return SimpleNamespace
