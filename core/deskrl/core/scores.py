"""What the learner made of the tokens of a batch, as it is kept for whoever looks at an episode: one file a batch.

Knows the file's form and its place; the learner writes it, viewers read it. Nothing is learnt from it again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from deskrl.core.runfolder import RunFolder, write_atomically
from deskrl.core.trajectory import CodecError

_SCHEMA = 1


@dataclass(frozen=True)
class EpisodeScores:
    """One episode in one group of a batch."""

    advantage: float
    replayed: bool
    """A stored success, in the place of a member."""
    logprobs: tuple[float, ...]
    """Of its action tokens, step after step, under the policy that the batch started from."""
    entropies: tuple[float, ...]
    """Of the distributions that these tokens are of, in nats."""


BatchScores = Mapping[str, Mapping[str, EpisodeScores]]
"""Scores by group id and episode id: a stored success may stand in several groups."""


def write_scores(folder: RunFolder, batch_id: str, batch: BatchScores, keep: int) -> None:
    """Write a batch's scores, and remove the oldest files beyond `keep`; 0 keeps and writes none."""
    if keep == 0:
        return
    folder.scores.mkdir(exist_ok=True)
    groups = {group: {name: _pack(scores) for name, scores in episodes.items()} for group, episodes in batch.items()}
    write_atomically(folder.scores / _file_name(batch_id), msgpack.packb({"schema": _SCHEMA, "groups": groups}))
    for path in sorted(folder.scores.glob("*.msgpack"))[:-keep]:
        path.unlink()


def read_scores(folder: RunFolder, batch_id: str) -> BatchScores:
    """The scores of a batch; empty if none are kept of it.

    Raises:
        CodecError: the file is damaged.
    """
    try:
        data = (folder.scores / _file_name(batch_id)).read_bytes()
    except FileNotFoundError:
        return {}
    try:
        record = msgpack.unpackb(data, strict_map_key=True, max_ext_len=0)
        if record["schema"] != _SCHEMA:
            raise CodecError("scores of another schema version")
        return {group: dict(_unpack(episodes)) for group, episodes in record["groups"].items()}
    except CodecError:
        raise
    except Exception as error:  # msgpack and malformed records fail in many ways; all mean one thing here
        raise CodecError(f"no scores: {error}") from error


def _file_name(batch_id: str) -> str:
    return batch_id.replace("/", "-") + ".msgpack"


def _pack(scores: EpisodeScores) -> dict[str, Any]:
    values = (*scores.logprobs, *scores.entropies)
    return {
        "advantage": scores.advantage,
        "replayed": scores.replayed,
        "values": struct.pack(f"<{len(values)}f", *values),
    }


def _unpack(episodes: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, EpisodeScores]]:
    for name, record in episodes.items():
        values = struct.unpack(f"<{len(record['values']) // 4}f", record["values"])
        middle = len(values) // 2
        yield name, EpisodeScores(record["advantage"], record["replayed"], values[:middle], values[middle:])
