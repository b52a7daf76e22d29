"""Commands for datasets: export of a run's episodes, and import of recorded episodes as demonstrations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from deskrl.cli.arguments import Commands, add_run, number

_FORMATS = ("osworld", "agentnet", "deskrl", "parquet")


def add_commands(commands: Commands) -> None:
    """Add the commands."""
    data = commands.add_level("data", "export episodes as a dataset, and import recorded ones as demonstrations")
    exporting = data.add(
        "export",
        "write the episodes of a run as Parquet files for Hugging Face datasets, also while it is running",
        _export,
        role="data",
        takes_overrides=False,
    )
    add_run(exporting)
    exporting.add_argument("out", type=Path, help="folder of the dataset, which must not exist")
    exporting.add_argument("--queue", default="", help="only episodes of this queue, such as train; unset: all")
    exporting.add_argument("--task", default="", help="only episodes of the task with this id; unset: all")
    exporting.add_argument(
        "--min-reward", type=number(float), default=None, help="only episodes with at least this reward; unset: all"
    )
    importing = data.add(
        "import",
        "write recorded episodes as demonstrations, and count what is left out and why",
        _import,
        role="data",
        takes_overrides=False,
    )
    importing.add_argument(
        "source",
        type=Path,
        help="results of OSWorld's runners, AgentNet's JSONL files, demonstrations, or a dataset of deskrl data export",
    )
    importing.add_argument("out", type=Path, help="folder of the demonstrations, which must not exist")
    importing.add_argument(
        "--format", choices=_FORMATS, default=None, help="format of the source; unset: recognised by its files"
    )
    importing.add_argument(
        "--tasks", type=Path, default=None, help="folder of OSWorld's task files (evaluation_examples/examples)"
    )
    importing.add_argument(
        "--images", type=Path, default=None, help="folder of AgentNet's screenshots; unset: that of the JSONL files"
    )


def _export(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.analysis.datasets.export_run import export
    from deskrl.replay.stored_episodes import EpisodeFilter

    wanted = EpisodeFilter(task=options.task, queue=options.queue, min_reward=options.min_reward)
    return export(options.run, options.out, wanted)


def _import(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.analysis.datasets.import_data import Format, Source, import_source

    kind = None if options.format is None else Format(options.format)
    return import_source(Source(options.source, kind, options.tasks, options.images), options.out)
