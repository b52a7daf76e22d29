"""What starts one process of a run: the roles, the learner's side jobs, and what launchers ask.

Knows the roles by module name only, so that a machine needs the packages of the roles it runs, no others.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Sequence
from pathlib import Path

from deskrl.core import logs
from deskrl.core.commands.parsing import Commands, add_config, identified, read_config
from deskrl.core.config import RunConfig


def add_commands(commands: Commands) -> None:
    """Add them."""
    for role, help_text in (
        ("replay", "the replay service: leases, durable episodes, groups"),
        ("learner", "the learner: imitation, GRPO, checkpoints, weight updates"),
        ("inference", "an inference replica: batched vLLM behind gRPC"),
        ("actor", "an actor: owns desktops and plays episodes on them"),
    ):
        command = commands.add(role, help_text, _run_role)
        add_config(command)
        if role in ("inference", "actor"):
            command.add_argument("--index", type=int, default=0, help="which one of the run this is, from 0")
        if role == "actor":
            command.add_argument(
                "--unnumbered",
                dest="index",
                action="store_const",
                const=None,
                help="one that the launcher counts, not the configuration: it drives actor.desktops_per_actor desktops",
            )
    _add_side_jobs(commands)
    _add_launchers_help(commands)


def _add_side_jobs(commands: Commands) -> None:
    model = commands.add("model", "build the model that a configuration asks for", _model, role="learner")
    proof = commands.add(
        "prove-checkpoint", "compare a served checkpoint with transformers", _prove_checkpoint, role="learner"
    )
    repeat = commands.add(
        "learn-again", "learn again what a run has learnt, beside its replay service", _learn_again, role="learner"
    )
    add_config(model)
    add_config(proof, "configuration whose model.path is the checkpoint that is served")
    add_config(repeat, "the run's resolved configuration")
    for command in (proof, repeat):
        command.add_argument("outcome", type=Path, help="file for the outcome (JSON)")


def _add_launchers_help(commands: Commands) -> None:
    add_config(
        commands.add(
            "prepare", "write what the roles of a run expect to find; launchers run it before any role", _prepare
        )
    )
    add_config(commands.add("size", "print how many processes make the run, for launchers", _size))
    health = commands.add("health", "say by the exit status whether a server of the run is up: 0, or 1", _health)
    add_config(health)
    health.add_argument("server", choices=("replay", "inference"), help="which server")
    health.add_argument("--index", type=int, default=0, help="which replica, from 0")
    certificates = commands.add(
        "certificates",
        "make the certificates and the token of a run whose roles are on several hosts",
        _certify,
        takes_overrides=False,
    )
    certificates.add_argument("folder", type=Path, help="folder for them; its authority and token are kept")
    certificates.add_argument("--host", action="append", default=[], help="name or address of a server; again for more")
    certificates.add_argument("--days", type=int, default=365, help="until they expire")


def _run_role(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    role, index = options.command, getattr(options, "index", None)
    config = identified(read_config(options.config, overrides), role)
    logs.setup(role if index is None else f"{role}-{index}")
    if role == "learner" and _needs_ranks(config):
        return _run_ranks(config, ["learner", str(options.config), *overrides])
    run = importlib.import_module(f"deskrl.{role}.main").run
    return int(run(config, index) if "index" in options else run(config))


def _learn_again(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    config = identified(read_config(options.config, overrides), "learner")
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
    # Else torchrun kills ranks 30 s after it told them to end, in the middle of a checkpoint. Whoever stops a run has
    # patience of its own, and ends the ranks too.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "900")
    # Without a place for logs, torchrun makes a temporary folder for them and leaves it there.
    world = [f"--nproc-per-node={config.learner.num_processes}", *rendezvous, f"--log-dir={os.devnull}"]
    return int(importlib.import_module("deskrl.learner.ranks").main([*world, "-m", "deskrl.core.cli", *command]))


def _model(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    config = identified(read_config(options.config, overrides), "learner")
    return int(importlib.import_module("deskrl.learner.policy.build_model").main(config))


def _prove_checkpoint(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    config = identified(read_config(options.config, overrides), "learner")
    return int(importlib.import_module("deskrl.learner.policy.proof").main(config, options.outcome))


def _prepare(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.core.running.launching import prepare

    return prepare(read_config(options.config, overrides))


def _size(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.core.running.launching import size

    return size(read_config(options.config, overrides))


def _health(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.core.running.launching import health

    return health(read_config(options.config, overrides), options.server, options.index)


def _certify(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from deskrl.core.security.certificates import make_certificates

    for path in make_certificates(options.folder, options.host, options.days):
        print(path)
    return 0
