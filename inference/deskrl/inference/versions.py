"""Policy versions as the engine's weight labels, and which tokens were sampled under which. Pure; knows no engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from deskrl.proto.v1 import common_pb2


@dataclass(frozen=True, order=True)
class Version:
    """A policy version; its text form `lineage/step` is the engine's label."""

    lineage: str
    step: int

    def __str__(self) -> str:
        return f"{self.lineage}/{self.step}"

    @classmethod
    def from_label(cls, label: str) -> Version:
        """Reads what `str` gives."""
        lineage, _, step = label.rpartition("/")
        return cls(lineage, int(step))

    @classmethod
    def from_message(cls, message: common_pb2.PolicyVersion) -> Version:
        """From the wire."""
        return cls(message.lineage, message.step)

    def to_message(self) -> common_pb2.PolicyVersion:
        """For the wire."""
        return common_pb2.PolicyVersion(lineage=self.lineage, step=self.step)


INITIAL = Version("initial", 0)
"""What a replica serves until its first update."""


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) of an action were sampled under `version`."""

    version: Version
    start: int
    end: int


class SpanCounter:
    """Counts spans of one action where the engine does not: told how far it is whenever the version changes."""

    def __init__(self) -> None:
        self._starts: list[tuple[Version, int]] = []
        self._num_tokens = 0

    def count_to(self, version: Version, num_tokens: int) -> None:
        """There are `num_tokens` now, and those not yet counted were sampled under `version`."""
        if num_tokens == self._num_tokens:
            return
        if not self._starts or self._starts[-1][0] != version:
            self._starts.append((version, self._num_tokens))
        self._num_tokens = num_tokens

    def spans(self) -> tuple[Span, ...]:
        """Spans that cover all tokens without gap or overlap."""
        bounds = pairwise([*(start for _, start in self._starts), self._num_tokens])
        return tuple(Span(version, start, end) for (version, _), (start, end) in zip(self._starts, bounds, strict=True))


def span_messages(spans: Iterable[Span]) -> list[common_pb2.VersionSpan]:
    """For the wire."""
    return [common_pb2.VersionSpan(version=s.version.to_message(), start=s.start, end=s.end) for s in spans]
