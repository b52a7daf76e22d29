"""Configuration: a record of its arguments."""

from types import SimpleNamespace as Config

__all__ = ["Config"]
