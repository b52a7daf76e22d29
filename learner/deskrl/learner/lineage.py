"""Policy versions as a tree: which weights acted, and how far they are from those that learn.

A learner that restores a checkpoint goes on under a new lineage, a branch that leaves its parent at the restored step.
The distance between two versions is the number of optimizer steps on the way from one to the other through the tree.
Knows nothing of checkpoints' contents.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Branch:
    """A lineage: it goes on from `start_step` of `parent`; the first one has none."""

    lineage: str
    parent: str
    start_step: int


@dataclass(frozen=True)
class VersionTree:
    """All lineages of a run, in the order in which they began; the last one is the current."""

    branches: tuple[Branch, ...]

    @property
    def current(self) -> str:
        """Name of the lineage that goes on."""
        return self.branches[-1].lineage

    def branch_off(self, lineage: str, parent: str, start_step: int) -> VersionTree:
        """The tree with a new current lineage."""
        return VersionTree((*self.branches, Branch(lineage, parent, start_step)))

    def distance(self, lineage: str, step: int, to_step: int) -> int | None:
        """Optimizer steps between (lineage, step) and (current lineage, to_step); None if no path joins them."""
        by_name = {branch.lineage: branch for branch in self.branches}
        if lineage not in by_name:
            return None
        # Up to which step each ancestor of the current version is shared with it.
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
        """Plain values for a file."""
        return [asdict(branch) for branch in self.branches]

    @staticmethod
    def from_json(value: list[dict[str, Any]]) -> VersionTree:
        """What `to_json` gave."""
        return VersionTree(tuple(Branch(**branch) for branch in value))
