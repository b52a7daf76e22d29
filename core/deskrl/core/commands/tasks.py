"""What is done with tasks: look at them, prove them, evaluate a checkpoint on them."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from deskrl.core.commands.parsing import Commands, read_config
from deskrl.core.errors import UserError


def add_commands(commands: Commands) -> None:
    """Add them."""
    _add_looks(commands.add_level("tasks", "look at tasks and prove them"))
    _add_evaluation(commands)
    evaluators = commands.add(
        "evaluators", "OSWorld's own evaluators, in an environment of their own", _install, takes_overrides=False
    )
    evaluators.add_argument("action", choices=["install"], help="install: make that environment, or finish it")


def _add_looks(commands: Commands) -> None:
    prove = commands.add(
        "prove",
        "show on real desktops that each task can be solved, and is not solved as it starts",
        _prove,
        role="actor",
        takes_overrides=False,
    )
    prove.add_argument("ids", nargs="*", help="task ids; none: the whole suite")
    prove.add_argument("--suite", type=Path, default=None, help="root of a suite; unset: deskrl's own")
    prove.add_argument("--list", type=Path, default=None, help="task list (JSON), in place of a suite and ids")
    prove.add_argument("--root", type=Path, default=None, help="folder of the list's task files; unset: beside it")
    prove.add_argument("--repeats", type=int, default=1, help="how often each task is proven, with other seeds")
    check = commands.add(
        "check",
        "say which tasks of a list are valid, and what each needs",
        _check,
        role="actor",
        takes_overrides=False,
    )
    _add_list(check)
    check.add_argument("--json", action="store_true", help="print one JSON document")
    noisy = commands.add(
        "noisy", "write noisy variants of a list's tasks, for --noisy", _noisy, role="actor", takes_overrides=False
    )
    noisy.add_argument("list", type=Path, help="task list (JSON)")
    noisy.add_argument("--root", type=Path, default=None, help="folder of the task files; unset: beside the list")
    noisy.add_argument("--level", choices=["light", "medium", "heavy"], required=True, help="how much is added")
    noisy.add_argument("--seed", type=int, default=0, help="which of the variants of that level")
    noisy.add_argument("--out", type=Path, required=True, help="folder to write the list and its examples_noisy/ to")
    fetch = commands.add(
        "fetch",
        "bring the files that a list's tasks name into the asset cache, so that they run offline",
        _fetch,
        role="actor",
        takes_overrides=False,
    )
    _add_list(fetch)
    fetch.add_argument("--jobs", type=int, default=4, help="transfers at a time")
    subset = commands.add(
        "subset",
        "make a subset of a list that is balanced over applications",
        _subset,
        role="actor",
        takes_overrides=False,
    )
    subset.add_argument("list", type=Path, help="task list (JSON)")
    subset.add_argument("--num", type=int, required=True, help="how many tasks it has")
    subset.add_argument("--seed", type=int, default=0, help="which of the balanced subsets")
    subset.add_argument("--out", type=Path, default=None, help="file to write; unset: print it")


def _add_list(command: argparse.ArgumentParser) -> None:
    command.add_argument("list", type=Path, help="task list (JSON)")
    command.add_argument("--root", type=Path, default=None, help="folder of the task files; unset: beside the list")
    command.add_argument("--suffix", default=None, help="what file names add to ids, as _noise; unset: found out")


def _add_evaluation(commands: Commands) -> None:
    evaluate = commands.add("eval", "play a checkpoint on a task list and say how often it succeeds", _evaluate)
    evaluate.add_argument(
        "--checkpoint",
        type=Path,
        default=None,
        help="folder of the model, as checkpoints/epoch_N; not with inference.external_url",
    )
    evaluate.add_argument(
        "--tasks",
        type=Path,
        nargs="+",
        default=[],
        metavar="LIST",
        help="task lists (JSON), each told apart; neither these nor --noisy: the tasks of the configuration",
    )
    evaluate.add_argument("--root", type=Path, default=None, help="folder of their task files; unset: beside each list")
    evaluate.add_argument("--suffix", default=None, help="what file names add to ids; unset: found out")
    evaluate.add_argument(
        "--noisy",
        type=Path,
        nargs="*",
        default=None,
        metavar="LIST",
        help="noisy variants of these lists too, examples_noisy/ beside each; none named: those of --tasks",
    )
    evaluate.add_argument("--repeats", type=int, default=1, help="episodes of each task")
    evaluate.add_argument("--temperature", type=float, default=None, help="of sampling; unset: that of training")
    evaluate.add_argument("--config", type=Path, default=None, help="run configuration; unset: the checkpoint's run's")
    evaluate.add_argument("--name", default=None, help="name of the evaluation; unset: made from what is evaluated")
    compare = commands.add(
        "compare",
        "compare two evaluations or two runs, paired where tasks match",
        _compare,
        takes_overrides=False,
    )
    compare.add_argument("a", type=Path, help="folder of an evaluation, or of a run")
    compare.add_argument("b", type=Path, help="folder of another one")
    compare.add_argument("--json", action="store_true", help="print one JSON document")


def _prove(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    prove = importlib.import_module("deskrl.actor.tasks.prove").main
    if options.list is not None and (options.suite is not None or options.ids):
        raise UserError("--list names the tasks, and so do --suite and ids", "give the one or the others")
    return int(prove(options.suite, tuple(options.ids), options.repeats, options.list, options.root))


def _check(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    check = importlib.import_module("deskrl.actor.tasks.commands").check
    return int(check(options.list, options.root, options.suffix, as_document=options.json))


def _noisy(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    noisy = importlib.import_module("deskrl.actor.tasks.commands").noisy
    return int(noisy(options.list, options.out, options.level, options.seed, options.root))


def _fetch(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    fetch = importlib.import_module("deskrl.actor.tasks.commands").fetch
    return int(fetch(options.list, options.root, options.suffix, options.jobs))


def _subset(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    subset = importlib.import_module("deskrl.actor.tasks.commands").subset
    return int(subset(options.list, options.num, options.seed, options.out))


def _evaluate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.core.evaluation.play import Plan, configure, evaluate
    from deskrl.core.evaluation.sets import choose_sets

    checkpoint = None if options.checkpoint is None else options.checkpoint.resolve()
    path = options.config or (checkpoint and checkpoint.parent.parent / "config.json")
    if path is None:
        raise UserError(
            "there is nothing to evaluate", "name a --checkpoint, or a --config with inference.external_url"
        )
    config = read_config(path, overrides)
    if (checkpoint is None) == (config.inference.external_url is None):
        raise UserError("one policy is evaluated", "name either --checkpoint or inference.external_url")
    if options.repeats < 1:
        raise UserError(f"--repeats {options.repeats} plays nothing", "give 1 or more")
    sets = choose_sets(options.tasks, options.noisy, options.root, options.suffix)
    policy = checkpoint.name if checkpoint is not None else "external"
    name = options.name or "-".join([config.name, policy, *(one.name for one in sets)])
    plan = Plan(options.repeats, options.temperature or config.learner.grpo.temperature)
    return evaluate(configure(config, checkpoint, name), sets, plan)


def _compare(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.core.evaluation.comparison import main as compare

    return compare(options.a, options.b, as_document=options.json)


def _install(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    return int(importlib.import_module("deskrl.actor.official.environment").install())
