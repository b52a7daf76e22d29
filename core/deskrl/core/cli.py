"""The command line: parses, then imports the one role that was asked for.

Knows the roles by module name only, so that `deskrl --help` and a refused configuration answer at once and a machine
needs the packages of the roles it runs, no others.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from deskrl.core import logs
from deskrl.core.config import RunConfig, load_config, read_resolved
from deskrl.core.errors import UserError, missing_package
from deskrl.core.explain.timing import Assumptions

if TYPE_CHECKING:
    from deskrl.core.arpo import Note

_ROLES = ("replay", "learner", "inference", "actor")
_ROLE_OF = {"model": "learner", "prove-checkpoint": "learner", "learn-again": "learner", "tasks": "actor"}
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Bad input is one line on standard error and status 2."""
    try:
        return _dispatch(sys.argv[1:] if arguments is None else list(arguments))
    except UserError as error:
        return _refuse(error)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        where = f"; {error.filename} could not be written" if error.filename else ""
        mend = "free some space and give the same command again; nothing that was acknowledged is lost"
        return _refuse(UserError(f"the disk is full{where}", mend))
    except KeyboardInterrupt:
        return 130


def _refuse(error: UserError) -> int:
    """Tell a person, in one line whatever an engine's message held."""
    with contextlib.suppress(OSError):  # the log of a role may lie on the disk that is full
        print("deskrl:", *str(error).split(), file=sys.stderr, flush=True)
    return 2


class _Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="deskrl",
        description="Train computer-use agents by reinforcement learning on real desktops.",
        epilog="Any key of the configuration is an option too: deskrl up CONFIG --learner.grpo.num_updates 20",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help_text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        command.set_defaults(takes_overrides=True)
        return command

    for name, help_text in (
        ("up", "start every role of a run on this machine, watch it, and judge it at its end"),
        ("explain", "say what a run would do, need and take, and where it departs from ARPO, before anything starts"),
    ):
        command = add(name, help_text)
        command.add_argument("config", type=Path, help="run configuration (TOML)")
        command.add_argument(
            "--arpo",
            action="store_true",
            help="the configuration is one of ARPO's (YAML); overrides as worker.rollout.n=8 may follow",
        )
        if name == "explain":
            _add_assumptions(command)
    for role, help_text in (
        ("replay", "the replay service: leases, durable episodes, groups"),
        ("learner", "the learner: imitation, GRPO, checkpoints, weight updates"),
    ):
        add(role, help_text).add_argument("config", type=Path, help="run configuration")
    for role, help_text in (
        ("inference", "an inference replica: batched vLLM behind gRPC"),
        ("actor", "an actor: owns desktops and plays episodes on them"),
    ):
        command = add(role, help_text)
        command.add_argument("config", type=Path, help="run configuration")
        command.add_argument("--index", type=int, default=0, help="which replica or actor of the run this is, from 0")
    command.add_argument(
        "--unnumbered",
        dest="index",
        action="store_const",
        const=None,
        help="an actor that the launcher counts, not the configuration: it drives actor.desktops_per_actor desktops",
    )

    add("prepare", "write what the roles of a run expect to find; launchers run it before any role").add_argument(
        "config", type=Path, help="run configuration"
    )
    add("size", "print how many processes make the run, for launchers").add_argument(
        "config", type=Path, help="run configuration"
    )
    health = add("health", "say by the exit status whether a server of the run is up: 0, or 1")
    health.add_argument("config", type=Path, help="run configuration")
    health.add_argument("role", choices=("replay", "inference"), help="which server")
    health.add_argument("--index", type=int, default=0, help="which replica, from 0")

    model = add("model", "build the model that a configuration asks for")
    model.add_argument("config", type=Path, help="run configuration")
    proof = add("prove-checkpoint", "compare a served checkpoint with transformers")
    proof.add_argument("config", type=Path, help="configuration whose model.path is the checkpoint that is served")
    proof.add_argument("outcome", type=Path, help="file for the outcome (JSON)")
    report = add("report", "write report.html of a run, finished or cut short")
    report.add_argument("run", type=Path, help="the run's folder")
    report.set_defaults(takes_overrides=False)
    view = add("view", "serve the episodes of a run to a browser, also while it trains")
    view.add_argument("run", type=Path, help="the run's folder")
    view.add_argument("--port", type=int, default=7441, help="on the loopback address; 0: a free one")
    view.set_defaults(takes_overrides=False)

    status = add("status", "say how each role of a run is; exit status 0: all are well")
    status.add_argument("run", type=Path, help="the run's folder")
    status.set_defaults(takes_overrides=False)

    top = add("top", "show throughput, latencies and learning of a run as it goes")
    top.add_argument("run", type=Path, help="the run's folder")
    top.add_argument("--interval", type=float, default=2.0, help="seconds between two looks")
    top.add_argument("--frames", type=int, default=None, help="look so many times; unset: until Ctrl-C")
    top.set_defaults(takes_overrides=False)

    doctor = add("doctor", "check this machine, and a run's servers as it sees them; exit status 0: nothing to mend")
    doctor.add_argument("config", type=Path, nargs="?", help="run configuration, or the folder of a run")
    doctor.add_argument(
        "--role", action="append", choices=_ROLES, help="that is to run here; again for more; none: all"
    )

    again = add("replay-run", "learn again from a run's recorded batches: the same numbers, bit for bit?")
    again.add_argument("run", type=Path, help="folder of a run that is not running")
    again.set_defaults(takes_overrides=False)
    repeat = add("learn-again", "learn again what a run has learnt, beside its replay service")
    repeat.add_argument("config", type=Path, help="the run's resolved configuration")
    repeat.add_argument("outcome", type=Path, help="file for the outcome (JSON)")

    certificates = add("certificates", "make the certificates and the token of a run whose roles are on several hosts")
    certificates.add_argument("folder", type=Path, help="folder for them; its authority and token are kept")
    certificates.add_argument("--host", action="append", default=[], help="name or address of a server; again for more")
    certificates.add_argument("--days", type=int, default=365, help="until they expire")
    certificates.set_defaults(takes_overrides=False)

    tasks = commands.add_parser("tasks", help="look at tasks and prove them").add_subparsers(
        dest="tasks_command", required=True, metavar="COMMAND"
    )
    prove = tasks.add_parser(
        "prove", help="show on real desktops that each task can be solved, and is not solved as it starts"
    )
    prove.add_argument("ids", nargs="*", help="task ids; none: the whole suite")
    prove.add_argument("--suite", type=Path, default=None, help="root of a suite; unset: deskrl's own")
    prove.add_argument("--repeats", type=int, default=1, help="how often each task is proven, with other seeds")
    prove.set_defaults(takes_overrides=False)
    _add_list_commands(tasks)
    _add_evaluation_commands(add)
    evaluators = add("evaluators", "OSWorld's own evaluators, in an environment of their own")
    evaluators.add_argument("action", choices=["install"], help="install: make that environment, or finish it")
    evaluators.set_defaults(takes_overrides=False)
    return parser


def _add_evaluation_commands(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    evaluate = add("eval", "play a checkpoint on a task list and say how often it succeeds")
    evaluate.add_argument("--checkpoint", type=Path, required=True, help="folder of the model, as checkpoints/epoch_N")
    evaluate.add_argument(
        "--tasks", type=Path, default=None, help="task list (JSON); unset: those of the configuration"
    )
    evaluate.add_argument("--root", type=Path, default=None, help="folder of the task files; unset: beside the list")
    evaluate.add_argument("--suffix", default=None, help="what file names add to ids; unset: found out")
    evaluate.add_argument("--noisy", action="store_true", help="the list's noisy variants: examples_noisy/ and _noise")
    evaluate.add_argument("--repeats", type=int, default=1, help="episodes of each task")
    evaluate.add_argument("--temperature", type=float, default=None, help="of sampling; unset: that of training")
    evaluate.add_argument("--config", type=Path, default=None, help="run configuration; unset: the checkpoint's run's")
    evaluate.add_argument("--name", default=None, help="name of the evaluation; unset: made from what is evaluated")
    compare = add("compare", "compare two evaluations, paired where their tasks match")
    compare.add_argument("a", type=Path, help="folder of an evaluation")
    compare.add_argument("b", type=Path, help="folder of another one")
    compare.add_argument("--json", action="store_true", help="print one JSON document")
    compare.set_defaults(takes_overrides=False)


def _add_list_commands(tasks: argparse._SubParsersAction[_Parser]) -> None:
    check = tasks.add_parser("check", help="say which tasks of a list are valid, and what each needs")
    check.add_argument("list", type=Path, help="task list (JSON)")
    check.add_argument("--root", type=Path, default=None, help="folder of the task files; unset: examples/ at the list")
    check.add_argument("--suffix", default=None, help="what file names add to ids, as _noise; unset: found out")
    check.add_argument("--json", action="store_true", help="print one JSON document")
    subset = tasks.add_parser("subset", help="make a subset of a list that is balanced over applications")
    subset.add_argument("list", type=Path, help="task list (JSON)")
    subset.add_argument("--num", type=int, required=True, help="how many tasks it has")
    subset.add_argument("--seed", type=int, default=0, help="which of the balanced subsets")
    subset.add_argument("--out", type=Path, default=None, help="file to write; unset: print it")
    for command in (check, subset):
        command.set_defaults(takes_overrides=False)


def _add_assumptions(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON document")
    for name, field in Assumptions.model_fields.items():
        kind = int if field.annotation is int else float
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, default=field.default, help=field.description)


def _dispatch(arguments: Sequence[str]) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not options.takes_overrides:
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    try:
        return _perform(options, rest)
    except ModuleNotFoundError as error:  # wherever it is imported: engines only when they are needed
        if error.name is None or error.name.startswith("deskrl"):
            raise
        raise missing_package(error.name, _ROLE_OF.get(options.command, options.command)) from error


def _perform(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if options.command == "certificates":
        return _certify(options)
    if options.command == "up":
        from deskrl.core.up import up

        config, _ = _configure(options, rest)
        return up(_identified(config, "operator"))
    if options.command == "explain":
        from deskrl.core.explain.main import explain

        config, notes = _configure(options, rest)
        assumed = Assumptions(**{name: getattr(options, name) for name in Assumptions.model_fields})
        return explain(config, notes, assumed, as_document=options.json)
    if options.command == "report":
        from deskrl.core.up import report

        return report(options.run)
    if options.command == "status":
        from deskrl.core.status import status

        return status(options.run)
    if options.command == "top":
        from deskrl.core.top import top

        return top(options.run, options.interval, options.frames)
    if options.command == "replay-run":
        from deskrl.core.again import replay_run

        return replay_run(options.run)
    if options.command == "doctor":
        return _examine(options, rest)
    if options.command == "view":
        return int(importlib.import_module("deskrl.replay.viewer").main(options.run, options.port))
    if options.command == "tasks":
        return _look_at_tasks(options)
    if options.command == "eval":
        return _evaluate(options, rest)
    if options.command == "compare":
        from deskrl.core.evaluation.comparison import main as compare

        return compare(options.a, options.b, as_document=options.json)
    if options.command == "evaluators":
        return int(importlib.import_module("deskrl.actor.official.environment").install())
    config = _read(options.config, rest)
    if options.command in ("prepare", "size", "health"):
        return _help_launcher(options, config)
    _identified(config, _ROLE_OF.get(options.command, options.command))
    if options.command == "model":
        return int(importlib.import_module("deskrl.learner.build_model").main(config))
    if options.command == "learn-again":
        return _learn_again(config, options, rest)
    if options.command == "prove-checkpoint":
        return int(importlib.import_module("deskrl.learner.proof").main(config, options.outcome))
    return _run_role(options, config, rest)


def _identified(config: RunConfig, role: str) -> RunConfig:
    """Take on the role's identity, before any channel is made."""
    if config.security.folder is not None:
        importlib.import_module("deskrl.core.rpc").identify_as(role, config.security.folder)
    return config


def _help_launcher(options: argparse.Namespace, config: RunConfig) -> int:
    from deskrl.core import launching

    if options.command == "health":
        return launching.health(config, options.role, options.index)
    return launching.prepare(config) if options.command == "prepare" else launching.size(config)


def _examine(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from deskrl.core.doctor import doctor

    if options.config is None and rest:
        raise UserError(f"there is nothing to override: {' '.join(rest)}", "name a configuration")
    path = options.config / "config.json" if options.config is not None and options.config.is_dir() else options.config
    config = None if path is None else _read(path, rest)
    return doctor(config, options.role or _ROLES)


def _certify(options: argparse.Namespace) -> int:
    from deskrl.core.certificates import make_certificates

    for path in make_certificates(options.folder, options.host, options.days):
        print(path)
    return 0


def _configure(options: argparse.Namespace, rest: Sequence[str]) -> tuple[RunConfig, list[Note]]:
    """The configuration of a run, and what became of ARPO's keys if it is one of ARPO's."""
    if not options.arpo:
        return load_config(options.config, rest), []
    from deskrl.core.arpo import load_arpo

    return load_arpo(options.config, rest, must_resume=options.command == "up")


def _evaluate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.core.evaluation.play import Plan, configure, evaluate

    checkpoint = options.checkpoint.resolve()
    path = options.config or checkpoint.parent.parent / "config.json"
    config = _read(path, overrides)
    if options.repeats < 1:
        raise UserError(f"--repeats {options.repeats} plays nothing", "give 1 or more")
    if options.noisy and options.tasks is None:
        raise UserError("--noisy is about a task list", "name one with --tasks")
    root, suffix = options.root, options.suffix
    if options.noisy:
        root, suffix = root or options.tasks.parent / "examples_noisy", suffix or "_noise"
    played = options.tasks.stem if options.tasks else "tasks"
    name = options.name or f"{config.name}-{checkpoint.name}-{played}{'-noisy' if options.noisy else ''}"
    plan = Plan(options.repeats, options.temperature or config.learner.grpo.temperature)
    return evaluate(configure(config, checkpoint, name, options.tasks, root, suffix), plan)


def _look_at_tasks(options: argparse.Namespace) -> int:
    if options.tasks_command == "prove":
        prove = importlib.import_module("deskrl.actor.prove").main
        return int(prove(options.suite, tuple(options.ids), options.repeats))
    commands = importlib.import_module("deskrl.actor.task_commands")
    if options.tasks_command == "check":
        return int(commands.check(options.list, options.root, options.suffix, as_document=options.json))
    return int(commands.subset(options.list, options.num, options.seed, options.out))


def _read(path: Path, overrides: Sequence[str]) -> RunConfig:
    """A TOML configuration with overrides, or the resolved JSON of a run, which takes none."""
    if path.suffix != ".json":
        return load_config(path, overrides)
    if overrides:
        raise UserError(f"{path} is a resolved configuration", "override its TOML file instead")
    return read_resolved(path)


def _run_role(options: argparse.Namespace, config: RunConfig, overrides: Sequence[str]) -> int:
    role, index = options.command, getattr(options, "index", None)
    logs.setup(role if index is None else f"{role}-{index}")
    if role == "learner" and _needs_ranks(config):
        return _run_ranks(config, ["learner", str(options.config), *overrides])
    run = importlib.import_module(f"deskrl.{role}.main").run
    return int(run(config, index) if "index" in options else run(config))


def _learn_again(config: RunConfig, options: argparse.Namespace, overrides: Sequence[str]) -> int:
    logs.setup("learner")
    if _needs_ranks(config):
        return _run_ranks(config, ["learn-again", str(options.config), str(options.outcome), *overrides])
    return int(importlib.import_module("deskrl.learner.again").main(config, options.outcome))


def _needs_ranks(config: RunConfig) -> bool:
    return config.learner.num_processes > 1 and "RANK" not in os.environ


def _run_ranks(config: RunConfig, command: Sequence[str]) -> int:
    """Have torchrun start the ranks, each with the same command again."""
    port = config.learner.master_port
    rendezvous = [f"--master-port={port}"] if port else ["--standalone"]
    world = [f"--nproc-per-node={config.learner.num_processes}", *rendezvous]
    return int(importlib.import_module("deskrl.learner.ranks").main([*world, "-m", "deskrl.core.cli", *command]))


if __name__ == "__main__":
    sys.exit(main())
