"""Commands that start one process of a run: roles, jobs of the learner, and commands for launchers.

A role is imported only when its command runs, so that a machine needs the packages of its own roles only.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from deskrl.cli.arguments import Commands, add_config, number, read_config, with_identity, with_run
from deskrl.core import console
from deskrl.core.config import RunConfig
from deskrl.core.config.value_types import Days, NonNegativeInt


def add_commands(commands: Commands) -> None:
    """Add the commands."""
    for role, help_text in (
        ("replay", "run the replay service: leases rollouts, stores episodes, serves batches"),
        ("learner", "run the learner: warm start, GRPO, checkpoints, weight updates"),
        ("inference", "run an inference replica: vLLM behind gRPC"),
        ("actor", "run an actor: runs episodes on its desktops"),
    ):
        command = commands.add(role, help_text, _run_role)
        add_config(command)
        if role == "learner":
            command.add_argument(
                "--node-rank",
                type=number(NonNegativeInt),
                default=None,
                help="rank of this node, from 0; required if learner.num_nodes is above 1",
            )
        if role in ("inference", "actor"):
            command.add_argument(
                "--index", type=number(NonNegativeInt), default=0, help="index of this process, from 0"
            )
        if role == "actor":
            command.add_argument(
                "--unnumbered",
                dest="index",
                action="store_const",
                const=None,
                help="this actor is one of a number chosen by the launcher; it runs actor.desktops_per_actor desktops",
            )
    _add_side_jobs(commands)
    _add_launcher_commands(commands)


def _add_side_jobs(commands: Commands) -> None:
    model = commands.add("build-model", "build the model that model.build selects", _build_model, role="learner")
    verification = commands.add(
        "verify-checkpoint", "compare a checkpoint served by vLLM with transformers", _verify_checkpoint, role="learner"
    )
    reproduction = commands.add(
        "reproduce-updates",
        "train again on the batches of a running replay service (used by reproduce)",
        _reproduce_updates,
        role="learner",
    )
    add_config(model)
    add_config(verification, "configuration whose model.path is the served checkpoint")
    add_config(reproduction, "resolved configuration of the run")
    for command in (verification, reproduction):
        command.add_argument("outcome", type=Path, help="file to write the outcome to (JSON)")
    merge = commands.add(
        "merge-adapter",
        "merge a checkpoint of a LoRA run into its model, and write a model folder",
        _merge_adapter,
        role="learner",
        takes_overrides=False,
    )
    merge.add_argument("checkpoint", type=Path, help="checkpoint, or any folder that contains an adapter of peft")
    merge.add_argument("output", type=Path, help="folder of the merged model; must not exist")
    merge.add_argument(
        "--base", type=Path, default=None, help="model folder; unset: the one that adapter_config.json names"
    )
    merge.add_argument(
        "--architecture", default=None, help="model.architecture of the run; unset: found by model_type in config.json"
    )


def _add_launcher_commands(commands: Commands) -> None:
    add_config(commands.add("prepare", "write the run directory; launchers run this before any role", _prepare))
    add_config(commands.add("size", "print the number of processes of each role, for launchers", _size))
    health = commands.add("health", "check whether a server of the run is healthy: exit status 0 or 1", _health)
    add_config(health)
    health.add_argument("server", choices=("replay", "inference"), help="server to check")
    health.add_argument("--index", type=number(NonNegativeInt), default=0, help="index of the replica, from 0")
    certificates = commands.add(
        "certificates",
        "create the certificates and the token for a run on several hosts",
        _certify,
        takes_overrides=False,
    )
    certificates.add_argument("dir", type=Path, help="directory for them; an existing authority and token are kept")
    certificates.add_argument(
        "--host", action="append", default=[], help="host name or address of a server; may be repeated"
    )
    certificates.add_argument("--days", type=number(Days), default=365, help="number of days until they expire")


def _run_role(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    role, index = options.command, getattr(options, "index", None)
    config = with_identity(read_config(options.config, overrides), role)
    console.set_up_logging(role if index is None else f"{role}-{index}")
    if role == "learner":
        return _run_learner(config, options, overrides)
    return _role_runner(role, index)(config)


def _run_learner(config: RunConfig, options: argparse.Namespace, overrides: Sequence[str]) -> int:
    if not _is_rank():
        from deskrl.learner.nodes.node_rank import checked_rank

        node_rank = checked_rank(config.learner, options.node_rank)
        if config.learner.num_ranks > 1:
            return _run_ranks(config, node_rank, ["learner", str(options.config), *overrides])
    from deskrl.learner import main

    return int(main.run(config))


def _role_runner(role: str, index: int | None) -> Callable[[RunConfig], int]:
    """Return the function that runs one role; imports the packages of that role only."""
    if role == "replay":
        from deskrl.replay import main as replay

        return replay.run
    if role == "inference":
        from deskrl.inference import main as inference

        assert index is not None  # its command has a default index; only an actor may have none
        return lambda config: inference.run(config, index)
    from deskrl.actor import main as actor

    return lambda config: actor.run(config, index)


def _reproduce_updates(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    config = with_identity(read_config(options.config, overrides), "learner")
    console.set_up_logging("learner")
    if config.learner.num_ranks > 1 and not _is_rank():
        return _run_ranks(config, 0, ["reproduce-updates", str(options.config), str(options.outcome), *overrides])
    from deskrl.learner import reproduce_updates

    return int(reproduce_updates.main(config, options.outcome))


def _is_rank() -> bool:
    """Return whether torchrun has started this process."""
    return "RANK" in os.environ


def _run_ranks(config: RunConfig, node_rank: int, command: Sequence[str]) -> int:
    """Start the ranks of this node with torchrun, each with the same command."""
    from deskrl.learner import torchrun_launch

    return int(torchrun_launch.main(config, node_rank, command))


def _build_model(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    config = with_identity(read_config(options.config, overrides), "learner")
    from deskrl.learner.policy import build_model

    return int(build_model.main(config))


def _verify_checkpoint(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    config = with_identity(read_config(options.config, overrides), "learner")
    from deskrl.learner.checkpoint import verify_checkpoint

    return int(verify_checkpoint.main(config, options.outcome))


def _merge_adapter(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.learner.checkpoint.merge_adapter import merge_adapter

    merge_adapter(options.checkpoint, options.output, options.base, options.architecture)
    return 0


def _prepare(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.launch.launcher_commands import prepare

    return prepare(read_config(options.config, overrides))


def _size(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.launch.launcher_commands import size

    return size(read_config(options.config, overrides))


def _health(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.launch.launcher_commands import health

    return health(with_run(read_config(options.config, overrides)), options.server, options.index)


def _certify(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.launch.certificates import make_certificates

    for path in make_certificates(options.dir, options.host, options.days):
        print(path)
    return 0
