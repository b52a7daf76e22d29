"""Writer of the Parquet files of one split: row groups of bounded size, in files of bounded size."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deskrl.analysis.datasets.parquet_schema import COLUMNS, dataset_schema
from deskrl.core.file_io import report_write_errors

MAX_GROUP_ROWS = 100
"""Rows of a row group, which viewers of datasets read as a whole."""
MAX_GROUP_BYTES = 64 * 1024**2
"""Bytes of screenshots after which a row group ends; they are in memory until then."""
MAX_SHARD_BYTES = 500 * 10**6
"""Bytes of screenshots after which the next file begins."""


class ShardWriter:
    """Writes `SPLIT-00000-of-0000N.parquet`, which are complete once `close` returns.

    The number of files is part of their names, so they get them at the end.

    Args:
        folder: existing folder.
        split: name of the split.
        max_shard_bytes: bytes of screenshots after which the next file begins.
    """

    def __init__(self, folder: Path, split: str, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder = folder
        self._split = split
        self._max_shard_bytes = max_shard_bytes
        self._schema = dataset_schema()
        self._rows: list[Mapping[str, Any]] = []
        self._row_bytes = 0
        self._shard_bytes = 0
        self._paths: list[Path] = []
        self._writer: pq.ParquetWriter | None = None
        self.num_rows = 0

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows of one episode, which are never divided between two files.

        Raises:
            UserError: the file cannot be written.
        """
        if self._shard_bytes + self._row_bytes >= self._max_shard_bytes:
            self._end_shard()
        for row in rows:
            self._rows.append(row)
            self._row_bytes += len(row["screenshot"]["bytes"])
            if len(self._rows) >= MAX_GROUP_ROWS or self._row_bytes >= MAX_GROUP_BYTES:
                self._end_group()
        self.num_rows += len(rows)

    def close(self) -> list[Path]:
        """Complete the files and return their paths; raises UserError if they cannot be written."""
        self._end_shard()
        num_shards = len(self._paths)
        return [
            path.rename(self._folder / f"{self._split}-{number:05d}-of-{num_shards:05d}.parquet")
            for number, path in enumerate(self._paths)
        ]

    def abandon(self) -> None:
        """Close the file that is being written without completing it."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()

    def _end_group(self) -> None:
        if not self._rows:
            return
        with report_write_errors(self._folder / f"{self._split}-*.parquet"):
            self._write_group()
        self._shard_bytes += self._row_bytes
        self._rows, self._row_bytes = [], 0

    def _write_group(self) -> None:
        if self._writer is None:
            path = self._folder / f"{self._split}-{len(self._paths):05d}.partial"
            scalars = [name for name, (kind, _) in COLUMNS.items() if not pa.types.is_nested(kind)]
            texts = [name for name in scalars if COLUMNS[name][0] == pa.string()]
            # Dictionaries and statistics of screenshots would only take memory and space.
            self._writer = pq.ParquetWriter(
                path, self._schema, compression="zstd", use_dictionary=texts, write_statistics=scalars
            )
            self._paths.append(path)
        self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))

    def _end_shard(self) -> None:
        self._end_group()
        if self._writer is not None:
            with report_write_errors(self._folder / f"{self._split}-*.parquet"):
                self._writer.close()
            self._writer = None
        self._shard_bytes = 0
