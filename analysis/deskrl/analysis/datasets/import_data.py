"""Import of recorded episodes: writes each as a demonstration, and counts what is left out and why."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from deskrl.actor import demonstrations
from deskrl.actor.actions import ActionKind
from deskrl.actor.demonstrations import Demonstration, DemonstrationStep
from deskrl.analysis.datasets import osworld_results
from deskrl.analysis.datasets.agentnet import read_agentnet
from deskrl.analysis.datasets.osworld_results import read_osworld
from deskrl.analysis.datasets.output_folder import OutputFolder, output_folder
from deskrl.analysis.datasets.progress_lines import ProgressLines
from deskrl.analysis.datasets.recorded_episode import RecordedEpisode
from deskrl.analysis.datasets.step_decoding import decode_steps
from deskrl.core.errors import UserError
from deskrl.core.file_io import report_write_errors
from deskrl.core.left_out import LeftOut, count_of
from deskrl.core.rpc import VERSION

_MAX_NAME_CHARACTERS = 60
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
_TERMINATIONS = {ActionKind.FINISHED: "finished", ActionKind.INFEASIBLE: "infeasible"}


class Format(StrEnum):
    """Formats of recorded episodes."""

    OSWORLD = "osworld"
    AGENTNET = "agentnet"
    DESKRL = "deskrl"
    PARQUET = "parquet"


@dataclass(frozen=True)
class Source:
    """What is imported.

    Args:
        path: file or folder.
        format: format; None: recognised by the files.
        tasks: OSWorld: folder of task files.
        images: AgentNet: folder of screenshots; None: that of the file.
    """

    path: Path
    format: Format | None = None
    tasks: Path | None = None
    images: Path | None = None


def import_source(source: Source, out: Path) -> int:
    """Write the episodes of a source as demonstrations, print counts, and return the exit status.

    Args:
        source: what is imported.
        out: folder of the demonstrations, which must not exist.

    Raises:
        UserError: the source cannot be read or its format is not known, `out` exists, or nothing could be imported.
    """
    left_out = LeftOut()
    num_episodes, num_steps = import_episodes(source, out, left_out)
    left_out.print_table()
    counts = ", ".join(count_of(left_out.count(what), what) for what in ("episode", "step", "line"))
    print(f"{out}: {count_of(num_episodes, 'demonstration')} with {count_of(num_steps, 'step')}; left out: {counts}")
    return 0


def import_episodes(source: Source, out: Path, left_out: LeftOut) -> tuple[int, int]:
    """Write the demonstrations and return their number and that of their steps; see `import_source`."""
    kind = source.format or recognise_format(source.path)
    if not source.path.exists():
        raise UserError(f"{source.path}: not found", "give a file or folder with recorded episodes")
    with output_folder(out) as folder:
        writer = _Writer(folder, left_out)
        if kind is Format.DESKRL:
            writer.copy_all(source.path)
        else:
            for episode in folder.until_interrupted(_episodes(source, kind, left_out)):
                writer.write(episode)
        if writer.written.num_episodes == 0:
            left_out.print_table()
            num = left_out.count("episode") + left_out.count("line")
            hint = "the table shows why they were left out" if num else "give a folder that contains some"
            raise UserError(f"{source.path}: no episode could be imported of {num} that were found", hint)
    return writer.written.num_episodes, writer.written.num_steps


def recognise_format(path: Path) -> Format:
    """Return the format of a file or folder.

    Raises:
        UserError: it does not exist, or contains no file of a known format.
    """
    if not path.exists():
        raise UserError(f"{path}: not found", "give a file or folder with recorded episodes")
    if _parquet_files(path):
        return Format.PARQUET
    if _jsonl_files(path):
        return Format.AGENTNET
    for name, kind in ((demonstrations.FILE_NAME, Format.DESKRL), (osworld_results.FILE_NAME, Format.OSWORLD)):
        if path.is_dir() and next(path.rglob(name), None) is not None:
            return kind
    wanted = f"*.parquet, *.jsonl, {osworld_results.FILE_NAME} or {demonstrations.FILE_NAME}"
    raise UserError(f"{path}: no recorded episodes were found ({wanted})", "give another folder")


def _parquet_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    return [path] if path.suffix == ".parquet" else []


def _jsonl_files(path: Path) -> list[Path]:
    if path.is_dir():
        names = (osworld_results.FILE_NAME, "meta_data_merged.jsonl")  # the latter: AgentNet's list of tasks
        return sorted(file for file in path.glob("*.jsonl") if file.name not in names)
    return [path] if path.suffix == ".jsonl" else []


def _episodes(source: Source, kind: Format, left_out: LeftOut) -> Iterator[RecordedEpisode]:
    files = _parquet_files(source.path) if kind is Format.PARQUET else _jsonl_files(source.path)
    if kind is Format.OSWORLD:
        return read_osworld(source.path, source.tasks, left_out)
    if not files:
        raise UserError(f"{source.path}: no file of the format {kind} was found", "leave out --format, or correct it")
    if kind is Format.AGENTNET:
        return read_agentnet(files, source.images, left_out)
    from deskrl.analysis.datasets.parquet_episodes import read_parquet  # needs pyarrow

    return read_parquet(files, left_out)


class _Writer:
    """Writes demonstrations into a folder and counts what cannot be written."""

    def __init__(self, out: OutputFolder, left_out: LeftOut) -> None:
        self._out = out
        self._left_out = left_out
        self.written = ProgressLines()

    def write(self, episode: RecordedEpisode) -> None:
        """Write an episode with those of its steps that can be read."""
        if episode.reward is not None and not 0 <= episode.reward <= 1:
            self._left_out.add("episode", "its reward is not between 0 and 1", f"{episode.name} ({episode.reward:g})")
            return
        steps = decode_steps(episode.steps, self._left_out)
        if not steps:
            self._left_out.add("episode", "none of its steps could be read", episode.name)
            return
        folder = self._new_folder(episode.task_id)
        demonstrations.create_folder(folder)
        demonstration = Demonstration(
            task_id=episode.task_id,
            application=episode.application,
            instruction=episode.instruction,
            task=episode.task,
            seed=episode.seed,
            screen_size=steps[0].screen_size,
            source=episode.source,
            deskrl_version=VERSION,
            steps=tuple(
                DemonstrationStep(
                    action=step.action,
                    player=step.recorded.player,
                    screenshot=demonstrations.write_screenshot(folder, number, step.png),
                    time_s=step.recorded.time_s,
                    thought=step.recorded.thought,
                )
                for number, step in enumerate(steps)
            ),
            reward=episode.reward,
            evidence=episode.evidence,
            termination=_TERMINATIONS.get(steps[-1].action.kind, episode.termination),
            fault="" if episode.reward is not None else f"{episode.source} has no reward",
        )
        demonstrations.write_demonstration(folder, demonstration)
        try:  # texts and numbers of a source may be such that JSON cannot carry them
            demonstrations.read_demonstration(folder)
        except UserError as error:
            self._left_out.add("episode", "it cannot be stored as a demonstration", f"{episode.name} ({error.message})")
            shutil.rmtree(folder)
            return
        self.written.add_episode(len(demonstration.steps))

    def copy_all(self, root: Path) -> None:
        """Copy the valid demonstrations below a folder."""
        for folder in self._out.until_interrupted(demonstrations.find_demonstrations(root)):
            try:
                demonstration = demonstrations.read_demonstration(folder)
                names = {step.screenshot for step in demonstration.steps} | {demonstration.final_screenshot} - {None}
                images = {
                    name: demonstrations.read_screenshot(folder, demonstration, name)
                    for name in sorted(filter(None, names))
                }
            except UserError as error:
                self._left_out.add("episode", "it is not a valid demonstration", error.message)
                continue
            copy = self._new_folder(demonstration.task_id)
            demonstrations.create_folder(copy)
            for name, data in images.items():
                with report_write_errors(copy / name):
                    (copy / name).write_bytes(data)
            demonstrations.write_demonstration(copy, demonstration)
            self.written.add_episode(len(demonstration.steps))

    def _new_folder(self, task_id: str) -> Path:
        """Return the path of the next demonstration: its number and its task, in characters that paths may have."""
        name = _UNSAFE.sub("_", task_id)[:_MAX_NAME_CHARACTERS]
        return self._out.path / f"{self.written.num_episodes:06d}-{name}"
