"""Reads the record of a finished job from the replay store, the learner's result files and the logs of the actors."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_kit.record import AcknowledgedResult, Record, StoredEpisode, StoredGroup
from deskrl.core.config import RunConfig
from deskrl.core.ids import image_hash
from deskrl.core.run_dir import RunDir
from deskrl.core.step_codec import decode_step
from deskrl.learner.batches.token_stats import read_token_stats
from deskrl.replay.blob_log import BlobLocation, BlobLogReader

TRAIN = "train"
_ACKNOWLEDGED = re.compile(
    r"^\S+ \S+ INFO (?P<episode>[\w/.-]+): \w+, reward (?P<reward>[-\d.]+), (?P<steps>\d+) steps$", re.MULTILINE
)
"""Log entry that an actor writes after replay has acknowledged a result."""


@dataclass
class ActorLog:
    """Incremental reader of the log of one actor, which several consecutive processes may write."""

    path: Path
    acknowledged: list[AcknowledgedResult] = field(default_factory=list)
    _read_bytes: int = 0

    def read(self) -> None:
        """Read the entries written since the last call."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as log:
            log.seek(self._read_bytes)
            data = log.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._read_bytes += len(complete)
        now_s = time.monotonic()
        self.acknowledged += [
            AcknowledgedResult(entry["episode"], float(entry["reward"]), int(entry["steps"]), now_s)
            for entry in _ACKNOWLEDGED.finditer(complete.decode(errors="replace"))
        ]


def read_record(config: RunConfig, store: Path, **observed: Any) -> Record:
    """Return the record of a job whose roles have exited.

    Args:
        config: configuration of the run.
        store: copy of the replay store.
        observed: fields that were observed while the job ran: `acknowledged`, `unexpected_exits`, `orphans`.
    """
    folder = RunDir(config.run_dir)
    with sqlite3.connect(store / "replay.sqlite") as database:
        episodes = _episodes(database, BlobLogReader(store))
        groups = _groups(database)
        committed = frozenset(
            name for (name,) in database.execute("SELECT batch_id FROM batches WHERE queue = ? AND committed", (TRAIN,))
        )
    database.close()
    return Record(
        num_updates=config.learner.grpo.num_updates,
        num_rollouts=config.tasks.num_rollouts,
        max_staleness=config.learner.grpo.max_staleness,
        episodes=episodes,
        groups=groups,
        committed=committed,
        trained={batch_id: _trained(folder, batch_id) for batch_id in sorted(committed)},
        history=_history(folder),
        updates=list(folder.read_metrics("update")),
        weights=list(folder.read_metrics("weights")),
        **observed,
    )


def _episodes(database: sqlite3.Connection, blob_log: BlobLogReader) -> dict[str, StoredEpisode]:
    intact = _intact_images(database, blob_log)
    rows = database.execute(
        "SELECT r.id, episode_id, group_id, r.state, reward, r.num_steps"
        " FROM rollouts r JOIN groups g ON g.position = r.group_position WHERE NOT removed"
    ).fetchall()
    return {row[1]: _episode(database, intact, row) for row in rows}


def _episode(database: sqlite3.Connection, intact: frozenset[str], row: tuple[Any, ...]) -> StoredEpisode:
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
        lost_images=tuple(sorted({name for step in steps for name in step.images} - intact)),
    )


def _intact_images(database: sqlite3.Connection, blob_log: BlobLogReader) -> frozenset[str]:
    """Return the hashes of the screenshots whose stored bytes have that hash."""
    rows = database.execute("SELECT hash, segment, position, num_bytes FROM images").fetchall()
    return frozenset(
        name.hex()
        for name, segment, position, num_bytes in rows
        if image_hash(blob_log.read(BlobLocation(segment, position), num_bytes)) == name.hex()
    )


def _groups(database: sqlite3.Connection) -> list[StoredGroup]:
    rows = database.execute(
        "SELECT group_id, state, num_planned, num_leased, num_finished, num_faulted"
        " FROM groups WHERE queue = ? ORDER BY position",
        (TRAIN,),
    )
    return [StoredGroup(*row) for row in rows]


def _history(folder: RunDir) -> list[dict[str, Any]]:
    path = folder.checkpoints / "latest" / "learner.json"
    history: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["state"]["history"]
    return history


def _trained(folder: RunDir, batch_id: str) -> dict[str, frozenset[str]]:
    return {
        group_id: frozenset(name for name, scores in episodes.items() if not scores.from_success_buffer)
        for group_id, episodes in read_token_stats(folder, batch_id).items()
    }
