"""Export of a run's episodes from its replay store to Parquet files, also while the run is in progress."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deskrl.analysis.datasets.dataset_card import dataset_card
from deskrl.analysis.datasets.output_folder import OutputFolder, output_folder
from deskrl.analysis.datasets.progress_lines import ProgressLines
from deskrl.analysis.datasets.shard_writer import MAX_SHARD_BYTES, ShardWriter
from deskrl.analysis.formatting import format_size
from deskrl.analysis.run_config import read_run_config
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.file_io import report_write_errors
from deskrl.core.left_out import LeftOut, count_of
from deskrl.core.rpc import VERSION
from deskrl.core.run_dir import RunDir
from deskrl.core.screenshot_png import open_screenshot
from deskrl.core.step_codec import CodecError, Step
from deskrl.learner.batches.token_stats import BatchTokenStats, read_token_stats
from deskrl.proto.v1 import rollout_pb2
from deskrl.replay.store_reader import ImageDamaged, ImageUnavailable, StoreReader
from deskrl.replay.stored_episodes import EpisodeFilter, EpisodeRecord, GroupRecord


@dataclass
class ExportResult:
    """What an export wrote and left out."""

    left_out: LeftOut = field(default_factory=LeftOut)
    splits: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Number of episodes and of steps by split."""
    num_bytes: int = 0
    """Size of the Parquet files."""


class _EpisodeLeftOut(Exception):
    """An episode that cannot be exported; the message is the reason."""


def export(root: Path, out: Path, wanted: EpisodeFilter) -> int:
    """Export the episodes of a run, print what was written and left out, and return the exit status.

    Args:
        root: run directory.
        out: folder of the dataset, which must not exist.
        wanted: conditions that the exported episodes satisfy.

    Raises:
        UserError: `root` contains no run, its replay store cannot be read, `out` exists or cannot be created, or there
            is no episode to export.
    """
    run_dir = RunDir(root.absolute())
    result = export_run(run_dir, out, wanted)
    result.left_out.print_table()
    num_episodes, num_steps = (sum(numbers) for numbers in zip(*result.splits.values(), strict=True))
    written = f"{count_of(num_episodes, 'episode')} with {count_of(num_steps, 'step')}, {format_size(result.num_bytes)}"
    print(f"{out}: {written}; {count_of(result.left_out.count('episode'), 'episode')} left out")
    return 0


def export_run(
    run_dir: RunDir, out: Path, wanted: EpisodeFilter, max_shard_bytes: int = MAX_SHARD_BYTES
) -> ExportResult:
    """Write the dataset; see `export`. An export that fails leaves no files behind."""
    exporter = _Exporter(read_run_config(run_dir), run_dir, StoreReader(run_dir.replay))
    with output_folder(out) as folder:
        result = exporter.write(folder, wanted, max_shard_bytes)
        card = dataset_card(run_dir.root.name, VERSION, result.splits)
        with report_write_errors(out / "README.md"):
            (folder.path / "README.md").write_text(card, encoding="utf-8")
    return result


class _Exporter:
    """Reads the episodes of one run group by group, so that at most one episode and one row group are in memory."""

    def __init__(self, config: RunConfig, run_dir: RunDir, reader: StoreReader) -> None:
        self._config = config
        self._run_dir = run_dir
        self._reader = reader
        self._stats: tuple[str, BatchTokenStats] = ("", {})

    def write(self, folder: OutputFolder, wanted: EpisodeFilter, max_shard_bytes: int) -> ExportResult:
        """Write all rows, and return the result; raises UserError if there are none."""
        result = ExportResult()
        written = ProgressLines()
        data = folder.path / "data"
        data.mkdir()
        writers: dict[str, ShardWriter] = {}
        try:
            for group, episode in folder.until_interrupted(self._episodes(wanted)):
                try:
                    rows = self._rows(group, episode, result.left_out)
                except _EpisodeLeftOut as error:
                    result.left_out.add("episode", str(error), episode.episode_id)
                    continue
                split = _split_of(group.queue)
                writer = writers.setdefault(split, ShardWriter(data, split, max_shard_bytes))
                writer.add(rows)
                written.add_episode(len(rows))
                num_episodes, num_steps = result.splits.get(split, (0, 0))
                result.splits[split] = (num_episodes + 1, num_steps + len(rows))
            if not result.splits:
                reasons = "".join(f"; {num} {reason}" for reason, num in result.left_out.reasons("episode").items())
                hint = "wait until an episode has ended, or select other ones"
                raise UserError(f"{self._run_dir.root}: no episode to export{reasons}", hint)
            paths = [path for writer in writers.values() for path in writer.close()]
        finally:
            for writer in writers.values():
                writer.abandon()
        result.num_bytes = sum(path.stat().st_size for path in paths)
        return result

    def _episodes(self, wanted: EpisodeFilter) -> Iterator[tuple[GroupRecord, EpisodeRecord]]:
        """Yield the ended episodes that match with their groups, in the order in which the groups began to end."""
        with self._reader.snapshot() as snapshot:
            listed = snapshot.list_episodes(wanted)
        ids_by_group: dict[str, set[str]] = {}
        for episode in reversed(listed):
            ids_by_group.setdefault(episode.group_id, set()).add(episode.episode_id)
        for group_id, ids in ids_by_group.items():
            with self._reader.snapshot() as snapshot:
                group = snapshot.get_group(group_id)
            assert group is not None  # groups are never removed
            yield from ((group, member) for member in group.members if member.episode_id in ids)

    def _rows(self, group: GroupRecord, episode: EpisodeRecord, left_out: LeftOut) -> list[dict[str, Any]]:
        """Return one row for each step of an episode.

        Raises:
            _EpisodeLeftOut: it ended with a fault, or its steps or screenshots are no longer stored or damaged.
        """
        result = episode.result
        if result is None:
            raise _EpisodeLeftOut("it ended with a fault, so it has no reward")
        if episode.removed:
            raise _EpisodeLeftOut("retention has removed its steps")
        try:
            with self._reader.snapshot() as snapshot:
                steps = snapshot.read_steps(episode)
            images = [self._reader.read_image(step.screenshot) for step in steps]
        except CodecError as error:
            raise _EpisodeLeftOut("a step is damaged") from error
        except ImageDamaged as error:
            raise _EpisodeLeftOut("a screenshot is damaged") from error
        except ImageUnavailable as error:
            raise _EpisodeLeftOut("a screenshot is not stored") from error
        if not steps:
            raise _EpisodeLeftOut("it has no steps")
        of_episode = {
            "episode_id": episode.episode_id,
            "group_id": group.group_id,
            "member": episode.member,
            "task_id": group.task_id,
            "queue": group.queue,
            "split": _split_of(group.queue),
            "seed": episode.seed,
            "instruction": group.instruction,
            "num_steps": len(steps),
            "reward": result.reward,
            "advantage": self._advantage(group, episode, left_out),
            "termination": _enum_value(rollout_pb2.Termination.Name(result.termination), "TERMINATION_"),
            "acting_policy": _enum_value(rollout_pb2.ActingPolicy.Name(episode.acting_policy), "ACTING_POLICY_"),
            "ended_unix_s": episode.ended_unix_s,
        }
        return [of_episode | self._columns(step, image) for step, image in zip(steps, images, strict=True)]

    def _columns(self, step: Step, image: bytes) -> dict[str, Any]:
        """Return the values of a step."""
        width, height = self._screen_size(image)
        return {
            "step": step.index,
            "screenshot": {"bytes": image, "path": f"{step.screenshot}.png"},
            "screen_width": width,
            "screen_height": height,
            "text": step.text,
            "action": json.dumps(step.action) if step.action else "",
            "temperature": step.temperature,
            "prompt_ids": step.prompt_ids,
            "action_ids": step.action_ids,
            "logprobs": step.logprobs,
            "policy_versions": [vars(span) for span in step.spans],
            "processor_hash": step.processor_hash,
        }

    def _screen_size(self, image: bytes) -> tuple[int, int]:
        """Return the size of the screen, which the run's configuration states if screenshots are resized."""
        with open_screenshot(image) as picture:
            width, height = picture.size
        agent, desktop = self._config.agent, self._config.desktop
        return desktop.width if agent.image_width else width, desktop.height if agent.image_height else height

    def _advantage(self, group: GroupRecord, episode: EpisodeRecord, left_out: LeftOut) -> float | None:
        """Return the advantage of an episode; None unless the run still has the token statistics of its batch."""
        if group.batch_id is None:
            return None
        if group.batch_id != self._stats[0]:
            try:
                self._stats = group.batch_id, read_token_stats(self._run_dir, group.batch_id)
            except CodecError:
                left_out.add("batch of advantages", "its token statistics are damaged", group.batch_id)
                self._stats = group.batch_id, {}
        stats = self._stats[1].get(group.group_id, {}).get(episode.episode_id)
        return None if stats is None else stats.advantage


def _split_of(queue: str) -> str:
    """Return the name of the split of a queue, in characters that a name of a split may have."""
    return "".join(char if char.isalnum() else "_" for char in queue.partition("/")[0]) or "other"


def _enum_value(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).lower()
