"""What a run refuses before anything of it is written or started: contradictions, ports, disk, tasks, model.

Knows the whole configuration and asks the roles about their part of it, so that a person hears of a mistake within a
second, and a mended configuration still finds an untouched folder. What only an engine can tell, its role refuses.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import socket
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

from deskrl.core import devices, model_folder, rpc
from deskrl.core.config import LearnerConfig, RunConfig
from deskrl.core.errors import UserError, missing_package
from deskrl.core.explain import facts, fitting, storage
from deskrl.core.exposition import mend_for
from deskrl.core.runfolder import RunFolder

MIN_FREE_BYTES = 64 * 1024**2
"""With less than this left on its disk a run does not start, and one that runs ends in good order."""

ENGINES = {"learner": ("torch", "transformers", "safetensors", "deepspeed"), "inference": ("vllm",)}
"""Packages beyond deskrl's own needs, by role."""


class Endpoint(NamedTuple):
    """One place where a role will listen, and the key that says so."""

    key: str
    host: str
    port: int


def refuse_bad_run(config: RunConfig) -> None:
    """Raise UserError for whatever can be known by now to keep this machine from learning; changes nothing."""
    refuse_unlearnable(config)
    refuse_missing_packages("learner")
    if config.wandb != "off":
        _refuse_missing_package("wandb", "wandb")
    refuse_unplayable(config)
    shape = facts.model_of(config, [])[1]
    if shape is not None:
        refuse_small_disk(RunFolder(config.folder), config.learner, storage.checkpoint_bytes(config.learner, shape))
    importlib.import_module("deskrl.learner.policy.checkpoint").refuse_unreadable(config)


def refuse_unplayable(config: RunConfig) -> None:
    """Raise UserError for whatever can be known by now to keep episodes from being played here; changes nothing."""
    refuse_contradictions(config)
    served_here = config.inference.external_url is None
    if served_here and config.inference.num_replicas == 0:
        raise UserError("inference.num_replicas = 0 starts no policy that could act", "set it to 1 or more")
    refuse_ports(config)
    refuse_full_disk(RunFolder(config.folder))
    if served_here:
        _refuse_unservable(config)
    importlib.import_module("deskrl.actor.agent.conversation").make_agent(config.agent)
    importlib.import_module("deskrl.actor.prepare").load(config)
    importlib.import_module("deskrl.actor.desktops.provider").refuse_unusable(config.desktop)


def _refuse_unservable(config: RunConfig) -> None:
    """Raise UserError for a model that could not be served on this machine."""
    refuse_missing_packages("inference")
    if devices.are_named(config):
        devices.refuse_missing(config, importlib.import_module("deskrl.learner.gpus").num_gpus())
    if config.model.path is not None:
        model_folder.refuse_incomplete(config.model.path)
    else:
        importlib.import_module("deskrl.learner.policy.build_model").refuse_unfit(config)
    sizing = facts.model_of(config, [])[2]
    fitting.refuse_what_does_not_fit(config, sizing.num_tokens(*config.image_size))


def refuse_contradictions(config: RunConfig) -> None:
    """Raise UserError for values that are fine each by itself and not together."""
    for contradiction in (*_contradictions(config), *devices.contradictions(config)):
        raise UserError(contradiction, "change one of the two")
    model_folder.refuse_other_family(config)


def refuse_unlearnable(config: RunConfig) -> None:
    """Raise UserError for what can be evaluated and not learnt with."""
    if (url := config.inference.external_url) is not None:
        raise UserError(
            f"inference.external_url = {url} takes no weights and tells neither token ids nor logprobs nor versions: "
            "nothing can be learnt from it",
            "unset it; `deskrl eval` takes it",
        )
    model_folder.refuse_quantized(config)


def refuse_missing_packages(role: str) -> None:
    """Raise UserError if an engine of the role is not installed on this machine, which is to run it."""
    for package in ENGINES[role]:
        _refuse_missing_package(package, role)


def _refuse_missing_package(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise missing_package(package, extra)


def refuse_ports(config: RunConfig) -> None:
    """Raise UserError if a role could not listen where it is to listen, or could be reached from other machines."""
    rpc.refuse_exposure(config.replay.listen_address)
    rpc.refuse_exposure(config.inference.listen_address(0))
    for key, host, port in endpoints(config):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                reason = f"{host}:{port} ({key}) cannot be listened on: {error.strerror}"
                is_metrics = key.endswith(".metrics_port")
                mend = mend_for(error, key) if is_metrics else f"choose another port with --{key}"
                raise UserError(reason, mend) from error


def refuse_full_disk(folder: RunFolder) -> None:
    """Raise UserError if the disk below the run's folder is all but full."""
    free_bytes = _free_bytes(folder)
    if free_bytes < MIN_FREE_BYTES:
        raise UserError(
            f"the disk of {folder.root} is full: {free_bytes // 1024**2} MiB are left, "
            f"{MIN_FREE_BYTES // 1024**2} are the least",
            "free some space and give the same command again; nothing that was acknowledged is lost",
        )


def refuse_small_disk(folder: RunFolder, learner: LearnerConfig, checkpoint_bytes: int) -> None:
    """Raise UserError if the disk has no room for the checkpoints that are still to come."""
    num_present = len(list(folder.checkpoints.glob("epoch_*")))
    num_missing = storage.most_checkpoints(learner) - num_present
    free_bytes = _free_bytes(folder)
    if free_bytes < num_missing * checkpoint_bytes:
        raise UserError(
            f"checkpoints take {checkpoint_bytes / 1e9:.0f} GB each, {num_missing} more at a time "
            f"(learner.keep_checkpoints = {learner.keep_checkpoints}, and one that is being written), "
            f"and the disk of {folder.root} has {free_bytes / 1e9:.0f} GB left",
            "choose another disk with --runs, free some space, or keep fewer checkpoints",
        )


def _free_bytes(folder: RunFolder) -> int:
    existing = next(path for path in (folder.root, *folder.root.parents) if path.exists())
    return shutil.disk_usage(existing).free


def endpoints(config: RunConfig) -> Iterator[Endpoint]:
    """Everything that the roles of a run will listen on; ports of replicas and actors count up."""
    num_replicas = config.inference.num_replicas
    for key, addresses in (
        ("replay.address", [config.replay.listen_address]),
        ("inference.address", [config.inference.listen_address(index) for index in range(num_replicas)]),
    ):
        for host, _, port in (address.rpartition(":") for address in addresses):
            yield Endpoint(key, host, int(port))
    metrics_host = config.security.metrics_host
    for key, host, first, num in (
        ("inference.openai_port", config.inference.openai_host, config.inference.openai_port, num_replicas),
        ("inference.metrics_port", metrics_host, config.inference.metrics_port, num_replicas),
        ("actor.metrics_port", metrics_host, config.actor.metrics_port, config.num_actors),
        ("replay.metrics_port", metrics_host, config.replay.metrics_port, 1),
        ("learner.metrics_port", metrics_host, config.learner.metrics_port, 1),
        ("learner.master_port", "127.0.0.1", config.learner.master_port, 1),
    ):
        yield from (Endpoint(key, host, first + index) for index in range(num) if first)


def _contradictions(config: RunConfig) -> Iterator[str]:
    for one, other in combinations(endpoints(config), 2):
        if one.port == other.port:
            yield f"{one.key} and {other.key} both come to port {one.port}"
    for endpoint in endpoints(config):
        if endpoint.port > 65535:
            yield f"{endpoint.key} counts up to port {endpoint.port}, and there are 65535"
    if (config.agent.image_width is None) != (config.agent.image_height is None):
        yield "only one of agent.image_width and agent.image_height is set"
    by_step = config.agent.context == "episode"
    shown, key = (
        (config.tasks.max_steps, "tasks.max_steps") if by_step else (config.agent.window_images, "agent.window_images")
    )
    if shown > config.inference.max_images:
        yield (
            f"{key} = {shown} screenshots can come into one prompt (agent.context = {config.agent.context}), "
            f"and inference.max_images = {config.inference.max_images}"
        )
    if config.inference.max_action_tokens >= config.inference.max_model_len:
        yield (
            f"inference.max_action_tokens = {config.inference.max_action_tokens} leaves no room for a prompt in "
            f"inference.max_model_len = {config.inference.max_model_len}"
        )
