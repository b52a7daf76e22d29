"""Commands for tasks: check, validate and derive task lists, evaluate and compare policies, record demonstrations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from deskrl.cli.arguments import Commands, number, read_config
from deskrl.core.config import RunConfig, keys_of_file, load_config, load_values, overridden_keys, read_resolved
from deskrl.core.config.value_types import NonNegativeFactor, Port, PositiveInt, Seed
from deskrl.core.errors import UserError


def add_commands(commands: Commands) -> None:
    """Add the commands."""
    _add_task_commands(commands.add_level("tasks", "check, validate, fetch and derive tasks"))
    _add_evaluation(commands)
    _add_recording(commands)
    evaluators = commands.add(
        "evaluators",
        "manage OSWorld's evaluators, which have a Python environment of their own",
        _install,
        takes_overrides=False,
    )
    evaluators.add_argument("action", choices=["install"], help="install: create the environment, or complete it")


def _add_validation_commands(commands: Commands) -> None:
    prove = commands.add(
        "prove",
        "validate tasks on real desktops: each can be solved, and is not solved in its initial state",
        _prove,
        role="actor",
    )
    prove.add_argument("ids", nargs="*", help="task ids; none: all tasks of the suite")
    prove.add_argument(
        "--suite",
        type=Path,
        default=None,
        help="root of a suite or of task bundles; unset: the provider's, or deskrl's",
    )
    prove.add_argument("--list", type=Path, default=None, help="task list (JSON), instead of a suite and ids")
    prove.add_argument(
        "--root", type=Path, default=None, help="directory of the list's task files; unset: examples/ next to the list"
    )
    prove.add_argument(
        "--repeats",
        type=number(PositiveInt),
        default=1,
        help="number of validations of each task, each with another seed",
    )
    _add_optional_config(prove)
    audit = commands.add(
        "audit",
        "run scripted cheats against tasks on real desktops: none may be rewarded",
        _audit,
        role="actor",
    )
    audit.add_argument("list", type=Path, nargs="?", default=None, help="task list (JSON); unset: a suite")
    audit.add_argument(
        "--suite",
        type=Path,
        default=None,
        help="root of a suite or of task bundles; unset: the provider's, or deskrl's",
    )
    audit.add_argument(
        "--root", type=Path, default=None, help="directory of the list's task files; unset: examples/ next to the list"
    )
    audit.add_argument("--tasks", nargs="+", default=[], metavar="ID", help="task ids; unset: all tasks")
    audit.add_argument("--cheats", nargs="+", default=[], metavar="NAME", help="names of cheats; unset: all")
    _add_optional_config(audit)


def _add_task_commands(commands: Commands) -> None:
    _add_validation_commands(commands)
    check = commands.add(
        "check",
        "report which tasks of a list or suite are valid, and what each requires",
        _check,
        role="actor",
        takes_overrides=False,
    )
    _add_list(check, "task list (JSON), or root of a suite or of task bundles")
    check.add_argument("--json", action="store_true", help="print one JSON document")
    noisy = commands.add(
        "noisy",
        "write noisy variants of the tasks of a list, for deskrl eval --noisy",
        _noisy,
        role="actor",
        takes_overrides=False,
    )
    noisy.add_argument("list", type=Path, help="task list (JSON)")
    noisy.add_argument(
        "--root", type=Path, default=None, help="directory of the task files; unset: examples/ next to the list"
    )
    noisy.add_argument("--level", choices=["light", "medium", "heavy"], required=True, help="amount of noise")
    noisy.add_argument("--seed", type=number(Seed), default=0, help="seed of the variant")
    noisy.add_argument("--out", type=Path, required=True, help="directory to write the list and its examples_noisy/ to")
    fetch = commands.add(
        "fetch",
        "download the files that the tasks of a list need into the asset cache, so that they run offline",
        _fetch,
        role="actor",
        takes_overrides=False,
    )
    _add_list(fetch)
    fetch.add_argument(
        "--jobs", type=number(Annotated[int, Field(ge=1, le=256)]), default=4, help="number of parallel downloads"
    )
    miniwob = commands.add(
        "miniwob",
        "make tasks of the pages of MiniWoB++",
        _miniwob,
        role="actor",
        takes_overrides=False,
    )
    miniwob.add_argument("--out", type=Path, required=True, help="directory to write html files, tasks and lists to")
    miniwob.add_argument(
        "--package", type=Path, default=None, help="wheel of the package miniwob; unset: the installed package"
    )
    miniwob.add_argument("--pages", nargs="+", default=[], metavar="PAGE", help="pages; unset: all playable pages")
    subset = commands.add(
        "subset",
        "choose a subset of a list that is balanced over applications",
        _subset,
        role="actor",
        takes_overrides=False,
    )
    subset.add_argument("list", type=Path, help="task list (JSON)")
    subset.add_argument("--num", type=number(PositiveInt), required=True, help="number of tasks")
    subset.add_argument("--seed", type=number(Seed), default=0, help="seed of the choice")
    subset.add_argument("--out", type=Path, default=None, help="file to write the subset to; unset: standard output")


def _add_optional_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", type=Path, default=None, help="run configuration (TOML), of which the desktops are used"
    )


def _optional_config(options: argparse.Namespace, overrides: Sequence[str]) -> RunConfig:
    """Return the configuration of `--config` with overrides; without it, the defaults with overrides."""
    if options.config is not None:
        return load_config(options.config, overrides)
    return load_values({}, "the command line", overrides)


def _add_list(command: argparse.ArgumentParser, help_text: str = "task list (JSON)") -> None:
    command.add_argument("list", type=Path, help=help_text)
    command.add_argument(
        "--root", type=Path, default=None, help="directory of the task files; unset: examples/ next to the list"
    )
    command.add_argument(
        "--suffix", default=None, help="suffix of file names after the id, such as _noise; unset: detected"
    )


def _add_evaluation(commands: Commands) -> None:
    evaluate = commands.add("eval", "evaluate a checkpoint on task lists", _evaluate)
    evaluate.add_argument(
        "--checkpoint",
        type=Path,
        default=None,
        help="directory of the model, such as checkpoints/epoch_N; excludes inference.external_url",
    )
    evaluate.add_argument(
        "--tasks",
        type=Path,
        nargs="+",
        default=[],
        metavar="LIST",
        help="task lists (JSON), each with its own result; without --tasks and --noisy: the tasks of the configuration",
    )
    evaluate.add_argument(
        "--root", type=Path, default=None, help="directory of the task files; unset: examples/ next to each list"
    )
    evaluate.add_argument("--suffix", default=None, help="suffix of file names after the id; unset: detected")
    evaluate.add_argument(
        "--noisy",
        type=Path,
        nargs="*",
        default=None,
        metavar="LIST",
        help="also evaluate the noisy variants of these lists (examples_noisy/ next to each); without LIST: of --tasks",
    )
    evaluate.add_argument("--repeats", type=number(PositiveInt), default=1, help="number of episodes of each task")
    evaluate.add_argument(
        "--temperature",
        type=number(NonNegativeFactor),
        default=None,
        help="sampling temperature; unset: that of training",
    )
    evaluate.add_argument(
        "--config", type=Path, default=None, help="run configuration; unset: that of the checkpoint's run"
    )
    evaluate.add_argument(
        "--name", default=None, help="name of the evaluation; unset: derived from the policy and the task lists"
    )
    compare = commands.add(
        "compare",
        "compare two evaluations or two runs; tasks that both have are paired",
        _compare,
        takes_overrides=False,
    )
    compare.add_argument("a", type=Path, help="directory of an evaluation, or run directory")
    compare.add_argument("b", type=Path, help="directory of the other evaluation or run")
    compare.add_argument("--json", action="store_true", help="print one JSON document")


def _add_recording(commands: Commands) -> None:
    record = commands.add(
        "record", "play a task on a desktop in the browser, and save a demonstration", _record, role="actor"
    )
    record.add_argument("task", help="id of a task of the configuration, or path of a task file or task bundle")
    record.add_argument(
        "--config", type=Path, default=None, help="run configuration (TOML or resolved JSON); unset: the defaults"
    )
    record.add_argument("--out", type=Path, default=None, help="folder to create; unset: a new one in demonstrations/")
    record.add_argument("--port", type=number(Port), default=0, help="port on the loopback address; 0: a free port")
    record.add_argument(
        "--policy",
        default=None,
        metavar="ADDRESS",
        help="server of a policy that can play too: host:port of a replica, or URL as in inference.external_url",
    )


def _prove(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.actor.tasks.prove import main as prove

    if options.list is not None and (options.suite is not None or options.ids):
        raise UserError("--list excludes --suite and task ids", "give only one of them")
    config = _optional_config(options, overrides)
    return prove(config, options.suite, tuple(options.ids), options.repeats, options.list, options.root)


def _audit(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.actor.tasks.audit import main as audit

    if options.list is not None and options.suite is not None:
        raise UserError("LIST excludes --suite", "give only one of them")
    config = _optional_config(options, overrides)
    return audit(config, options.suite, tuple(options.tasks), tuple(options.cheats), options.list, options.root)


def _check(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.cli.task_list_commands import check

    return int(check(options.list, options.root, options.suffix, as_document=options.json))


def _noisy(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.cli.task_list_commands import noisy

    return int(noisy(options.list, options.out, options.level, options.seed, options.root))


def _fetch(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.cli.task_list_commands import fetch

    return int(fetch(options.list, options.root, options.suffix, options.jobs))


def _miniwob(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.actor.miniwob.make_tasks import main as make_tasks

    return make_tasks(options.out, options.package, tuple(options.pages))


def _subset(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.cli.task_list_commands import subset

    return int(subset(options.list, options.num, options.seed, options.out))


def _evaluate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.analysis.evaluation.evaluation_runner import EvaluationPlan, evaluate, evaluation_config
    from deskrl.analysis.evaluation.task_sets import select_task_sets

    checkpoint = None if options.checkpoint is None else options.checkpoint.resolve()
    path = options.config or (checkpoint and checkpoint.parent.parent / "config.json")
    if path is None:
        raise UserError("no policy to evaluate", "give --checkpoint, or --config with inference.external_url")
    is_resolved = path.suffix == ".json"
    config = read_resolved(path, overrides) if is_resolved else read_config(path, overrides)
    # The ports of a resolved configuration are those of the run that wrote it.
    set_keys = overridden_keys(overrides) | (set() if is_resolved else keys_of_file(path))
    if (checkpoint is None) == (config.inference.external_url is None):
        raise UserError("--checkpoint and inference.external_url: exactly one must be set", "give only one of them")
    sets = select_task_sets(options.tasks, options.noisy, options.root, options.suffix)
    policy = checkpoint.name if checkpoint is not None else "external"
    name = options.name or "-".join([config.name, policy, *(one.name for one in sets)])
    plan = EvaluationPlan(options.repeats, options.temperature or config.learner.grpo.temperature)
    return evaluate(evaluation_config(config, checkpoint, name), sets, plan, set_keys)


def _record(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.analysis.recorder import is_url, record

    if options.policy is not None:
        key = "inference.external_url" if is_url(options.policy) else "inference.address"
        overrides = [*overrides, f"--{key}={options.policy}"]
    if options.config is not None and options.config.suffix == ".json":
        config = read_resolved(options.config, overrides)
    else:
        config = _optional_config(options, overrides)
    return record(config, options.task, options.out, options.port, options.policy)


def _compare(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.analysis.evaluation.comparison import compare

    return compare(options.a, options.b, as_document=options.json)


def _install(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.actor.osworld_evaluators import evaluator_environment

    return int(evaluator_environment.install())
