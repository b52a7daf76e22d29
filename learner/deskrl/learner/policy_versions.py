"""Policy versions as a tree of lineages, and the distance between two versions.

A learner that resumes from a checkpoint starts a new lineage, which leaves its parent at the step of the checkpoint.
The distance between two versions is the number of optimizer steps on the path between them through the tree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from deskrl.core.step_codec import VersionSpan

StalenessOf = Callable[[VersionSpan], int | None]
"""Function that returns the staleness of a span's policy: its distance to the current version; None if unknown."""


@dataclass(frozen=True)
class Lineage:
    """Sequence of policy versions that starts at `start_step` of the lineage `parent`; the first one has no parent."""

    lineage: str
    parent: str
    start_step: int


@dataclass(frozen=True)
class LineageTree:
    """All lineages of a run, oldest first; the last one is current."""

    lineages: tuple[Lineage, ...]

    @property
    def current(self) -> str:
        """Name of the current lineage."""
        return self.lineages[-1].lineage

    def fork(self, lineage: str, parent: str, start_step: int) -> LineageTree:
        """Return the tree with a new current lineage."""
        return LineageTree((*self.lineages, Lineage(lineage, parent, start_step)))

    def distance(self, lineage: str, step: int, to_step: int) -> int | None:
        """Return the optimizer steps between (lineage, step) and (current lineage, to_step); None if unconnected."""
        by_name = {each.lineage: each for each in self.lineages}
        if lineage not in by_name:
            return None
        # Last step that each ancestor of the current version shares with it.
        shared: dict[str, int] = {}
        name, limit = self.current, to_step
        while name:
            shared[name] = limit
            limit = min(limit, by_name[name].start_step)
            name = by_name[name].parent
        ancestor, common = lineage, step
        while ancestor not in shared:
            common = min(common, by_name[ancestor].start_step)
            ancestor = by_name[ancestor].parent
            if not ancestor:
                return None
        common = min(common, shared[ancestor])
        return (to_step - common) + (step - common)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the tree as JSON values."""
        return [asdict(each) for each in self.lineages]

    @staticmethod
    def from_json(value: list[dict[str, Any]]) -> LineageTree:
        """Return the tree that `to_json` serialised."""
        return LineageTree(tuple(Lineage(**each) for each in value))
