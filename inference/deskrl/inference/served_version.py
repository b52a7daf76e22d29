"""Policy versions that a replica serves, and the spans of sampled tokens per version."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from deskrl.proto.v1 import common_pb2


@dataclass(frozen=True, order=True)
class ServedVersion:
    """Policy version; its text form `lineage/step` is the weight label of the engine."""

    lineage: str
    step: int

    def __str__(self) -> str:
        return f"{self.lineage}/{self.step}"

    @classmethod
    def from_label(cls, label: str) -> ServedVersion:
        """Parse the result of `str`."""
        lineage, _, step = label.rpartition("/")
        return cls(lineage, int(step))

    @classmethod
    def from_message(cls, message: common_pb2.PolicyVersion) -> ServedVersion:
        """Convert from a protobuf message."""
        return cls(message.lineage, message.step)

    def to_message(self) -> common_pb2.PolicyVersion:
        """Convert to a protobuf message."""
        return common_pb2.PolicyVersion(lineage=self.lineage, step=self.step)


INITIAL_VERSION = ServedVersion("initial", 0)
"""Version that a replica serves until its first update."""


@dataclass(frozen=True)
class VersionedSpan:
    """Tokens [start, end) of an action, which were sampled under `version`."""

    version: ServedVersion
    start: int
    end: int


class SpanTracker:
    """Tracks the spans of one action for engines that do not; must be advanced at each change of the version."""

    def __init__(self) -> None:
        self._starts: list[tuple[ServedVersion, int]] = []
        self._num_tokens = 0

    def advance_to(self, version: ServedVersion, num_tokens: int) -> None:
        """Assign all tokens up to `num_tokens` that have no version yet to `version`."""
        if num_tokens == self._num_tokens:
            return
        if not self._starts or self._starts[-1][0] != version:
            self._starts.append((version, self._num_tokens))
        self._num_tokens = num_tokens

    def spans(self) -> tuple[VersionedSpan, ...]:
        """Return spans that cover all tokens without gap or overlap."""
        bounds = pairwise([*(start for _, start in self._starts), self._num_tokens])
        return tuple(
            VersionedSpan(version, start, end) for (version, _), (start, end) in zip(self._starts, bounds, strict=True)
        )


def span_messages(spans: Iterable[VersionedSpan]) -> list[common_pb2.VersionSpan]:
    """Convert spans to protobuf messages."""
    return [common_pb2.VersionSpan(version=s.version.to_message(), start=s.start, end=s.end) for s in spans]
