"""Settings of a Gymnasium environment, which its process gets as the first request."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

RENDER, OBSERVATION = "render", "observation"
"""Sources of the image that are not keys of the observation."""


@dataclass(frozen=True)
class GymnasiumSettings:
    """What environment is made, and how it is used."""

    id: str
    kwargs: dict[str, Any]
    image: str
    """`render`, `observation`, or the key of the observation that is the image."""
    actions: dict[str, Any]
    """Templates by gesture (see `gestures`); empty: the default of the action space."""
    instruction_key: str
    memory_bytes: int
    """Limit on the data of the process in bytes."""

    def to_line(self) -> bytes:
        """Return the settings as one line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> GymnasiumSettings:
        """Return the settings that `to_line` wrote."""
        return cls(**json.loads(line))
