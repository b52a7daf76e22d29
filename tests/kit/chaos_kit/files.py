"""Reads what a job left behind off its files: the store's rows and bytes, the learner's records, the actors' logs.

Judges nothing (`checks`).
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_kit.record import Acknowledged, Record, StoredEpisode, StoredGroup
from deskrl.core.config import RunConfig
from deskrl.core.ids import image_hash
from deskrl.core.runfolder import RunFolder
from deskrl.core.scores import read_scores
from deskrl.core.trajectory import decode_step
from deskrl.replay.segments import Place, SegmentReader

TRAIN = "train"
_ACKNOWLEDGED = re.compile(
    r"^\S+ \S+ INFO (?P<episode>[\w/.-]+): \w+, reward (?P<reward>[-\d.]+), (?P<steps>\d+) steps$", re.MULTILINE
)
"""What an actor writes once replay has told it that a result is on disk."""


@dataclass
class ActorLog:
    """What one actor says of its episodes, over all of its processes."""

    path: Path
    acknowledged: list[Acknowledged] = field(default_factory=list)
    _read_bytes: int = 0

    def read(self) -> None:
        """Take up what has been written since."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as log:
            log.seek(self._read_bytes)
            data = log.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        now_s = time.monotonic()
        self.acknowledged += [
            Acknowledged(told["episode"], float(told["reward"]), int(told["steps"]), now_s)
            for told in _ACKNOWLEDGED.finditer(whole.decode(errors="replace"))
        ]


def read_record(config: RunConfig, store: Path, **noted: Any) -> Record:
    """The record of a job whose roles have ended.

    Args:
        config: of its run.
        store: a copy of the replay store.
        noted: what was noted beside the files: `acknowledged`, `endings`, `orphans`.
    """
    folder = RunFolder(config.folder)
    with sqlite3.connect(store / "replay.sqlite") as database:
        episodes = _episodes(database, SegmentReader(store))
        groups = _groups(database)
        committed = frozenset(
            name for (name,) in database.execute("SELECT batch_id FROM batches WHERE queue = ? AND committed", (TRAIN,))
        )
    database.close()
    return Record(
        num_updates=config.learner.grpo.num_updates,
        rollouts=config.tasks.rollouts,
        max_staleness=config.learner.grpo.max_staleness,
        episodes=episodes,
        groups=groups,
        committed=committed,
        learnt={batch_id: _learnt(folder, batch_id) for batch_id in sorted(committed)},
        history=_history(folder),
        updates=list(folder.read_metrics("update")),
        weights=list(folder.read_metrics("weights")),
        **noted,
    )


def _episodes(database: sqlite3.Connection, segments: SegmentReader) -> dict[str, StoredEpisode]:
    whole = _whole_images(database, segments)
    rows = database.execute(
        "SELECT r.id, episode_id, group_id, r.state, reward, r.num_steps"
        " FROM rollouts r JOIN groups g ON g.position = r.group_position WHERE NOT removed"
    ).fetchall()
    return {row[1]: _episode(database, whole, row) for row in rows}


def _episode(database: sqlite3.Connection, whole: frozenset[str], row: tuple[Any, ...]) -> StoredEpisode:
    rollout, episode_id, group_id, state, reward, num_steps = row
    stored = database.execute("SELECT step, payload FROM steps WHERE rollout = ? ORDER BY step", (rollout,)).fetchall()
    steps = [decode_step(payload) for _, payload in stored]
    return StoredEpisode(
        episode_id=episode_id,
        group_id=group_id,
        state=state,
        reward=reward,
        num_steps=num_steps,
        step_indices=tuple(index for index, _ in stored),
        versions=frozenset((span.lineage, span.step) for step in steps for span in step.spans),
        lost_images=tuple(sorted({name for step in steps for name in step.images} - whole)),
    )


def _whole_images(database: sqlite3.Connection, segments: SegmentReader) -> frozenset[str]:
    """Hashes of the screenshots whose bytes are those that the hash is of."""
    rows = database.execute("SELECT hash, segment, position, num_bytes FROM images").fetchall()
    return frozenset(
        name.hex()
        for name, segment, position, num_bytes in rows
        if image_hash(segments.read(Place(segment, position), num_bytes)) == name.hex()
    )


def _groups(database: sqlite3.Connection) -> list[StoredGroup]:
    rows = database.execute(
        "SELECT group_id, state, num_planned, num_leased, num_finished, num_faulted"
        " FROM groups WHERE queue = ? ORDER BY position",
        (TRAIN,),
    )
    return [StoredGroup(*row) for row in rows]


def _history(folder: RunFolder) -> list[dict[str, Any]]:
    path = folder.checkpoints / "latest" / "learner.json"
    history: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["state"]["history"]
    return history


def _learnt(folder: RunFolder, batch_id: str) -> dict[str, frozenset[str]]:
    return {
        group_id: frozenset(name for name, scores in episodes.items() if not scores.replayed)
        for group_id, episodes in read_scores(folder, batch_id).items()
    }
