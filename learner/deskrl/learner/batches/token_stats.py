"""Token statistics of batches: advantages, logprobs and entropies, stored for viewers in one file per batch."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from deskrl.core.file_io import write_atomically
from deskrl.core.run_dir import RunDir
from deskrl.core.step_codec import CodecError

_SCHEMA = 1


@dataclass(frozen=True)
class EpisodeTokenStats:
    """Token statistics of one episode in one group of a batch."""

    advantage: float
    """Advantage of the episode in its group."""
    from_success_buffer: bool
    """Whether the episode is a stored success that replaces a member of the group."""
    logprobs: tuple[float, ...]
    """Logprobs of the action tokens of all steps, under the policy before the update."""
    entropies: tuple[float, ...]
    """Entropies of the distributions of these tokens, in nats."""


BatchTokenStats = Mapping[str, Mapping[str, EpisodeTokenStats]]
"""Token statistics by group id and episode id; a stored success may be in several groups."""


def write_token_stats(run_dir: RunDir, batch_id: str, batch: BatchTokenStats, keep: int) -> None:
    """Write the token statistics of a batch and delete the oldest files.

    Args:
        run_dir: run directory.
        batch_id: identifier of the batch.
        batch: token statistics of the batch.
        keep: number of files to keep; 0 writes none.
    """
    if keep == 0:
        return
    run_dir.token_stats.mkdir(exist_ok=True)
    groups = {group: {name: _pack(stats) for name, stats in episodes.items()} for group, episodes in batch.items()}
    write_atomically(run_dir.token_stats / _file_name(batch_id), msgpack.packb({"schema": _SCHEMA, "groups": groups}))
    for path in sorted(run_dir.token_stats.glob("*.msgpack"))[:-keep]:
        path.unlink()


def read_token_stats(run_dir: RunDir, batch_id: str) -> BatchTokenStats:
    """Return the token statistics of a batch; empty if there are none.

    Raises:
        CodecError: the file is damaged.
    """
    try:
        data = (run_dir.token_stats / _file_name(batch_id)).read_bytes()
    except FileNotFoundError:
        return {}
    try:
        record = msgpack.unpackb(data, strict_map_key=True, max_ext_len=0)
        if record["schema"] != _SCHEMA:
            raise CodecError("unsupported schema version of token statistics")
        return {group: dict(_unpack(episodes)) for group, episodes in record["groups"].items()}
    except CodecError:
        raise
    except Exception as error:  # msgpack and malformed records raise many types of errors
        raise CodecError(f"not token statistics: {error}") from error


def _file_name(batch_id: str) -> str:
    return batch_id.replace("/", "-") + ".msgpack"


def _pack(stats: EpisodeTokenStats) -> dict[str, Any]:
    values = (*stats.logprobs, *stats.entropies)
    return {
        "advantage": stats.advantage,
        "replayed": stats.from_success_buffer,
        "values": struct.pack(f"<{len(values)}f", *values),
    }


def _unpack(episodes: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, EpisodeTokenStats]]:
    for name, record in episodes.items():
        values = struct.unpack(f"<{len(record['values']) // 4}f", record["values"])
        middle = len(values) // 2
        yield name, EpisodeTokenStats(record["advantage"], record["replayed"], values[:middle], values[middle:])
