"""Preflight checks: reject a run whose configuration, ports, disk, tasks or model cannot work, before it starts.

The checks take about a second and write nothing, so that a corrected configuration starts from a clean run directory.
Problems that only an engine can detect are reported by the role that runs it.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Collection, Iterator
from typing import NamedTuple

from deskrl.actor.extensions import check_extensions
from deskrl.core import rpc
from deskrl.core.config import LearnerConfig, RunConfig
from deskrl.core.errors import UserError, missing_package
from deskrl.core.foreign_variables import check_engine_variables
from deskrl.core.listening import bind_error, listen_error
from deskrl.core.run_dir import RunDir
from deskrl.core.socket_paths import check_socket_path
from deskrl.launch import gpu_assignment
from deskrl.launch.sizing import batch_sizes, footprint, inputs
from deskrl.launch.supervisor import temporary_folder
from deskrl.learner.extensions import check_extensions as check_learner_extensions
from deskrl.models import model_checks
from deskrl.replay.store_folder import check_file_system

MIN_FREE_BYTES = 64 * 1024**2
"""A run does not start, and a running one stops gracefully, if its disk has less free space than this."""

ENGINES = {"learner": ("torch", "transformers", "safetensors", "deepspeed"), "inference": ("vllm",)}
"""Python packages that each role needs in addition to deskrl's own dependencies."""


class Endpoint(NamedTuple):
    """Address on which a role will listen, and the configuration key that sets it."""

    key: str
    host: str
    port: int


def check_run(config: RunConfig) -> None:
    """Check that this machine can train as configured. Changes nothing.

    Raises:
        UserError: a check failed.
    """
    check_learner(config)
    _check_one_node(config)
    check_packages("learner")
    if config.learner.has_lora:
        _check_package("peft", "learner")
    check_tasks(config)
    check_learner_extensions(config)  # reads the model, which was checked before
    shape = inputs.read_model(config).shape
    if shape is not None:
        footprint.num_trained_parameters(config.learner, shape)  # raises if LoRA has a target that no layer has
        check_disk_space(
            RunDir(config.run_dir),
            config.learner,
            footprint.checkpoint_bytes(config.learner, shape),
            footprint.merged_bytes(config.learner, shape),
        )
    from deskrl.learner.checkpoint import checkpoint_files, reference_record

    checkpoint_files.check_can_resume(config)
    reference_record.check_reference(config)


def _check_one_node(config: RunConfig) -> None:
    """Check that the learner runs on this machine only, where `deskrl up` starts all roles; raises UserError."""
    if config.learner.num_nodes > 1:
        raise UserError(
            f"learner.num_nodes = {config.learner.num_nodes}, but `deskrl up` starts the roles of one machine",
            "use another launcher (docs/launching.md), or set learner.num_nodes = 1",
        )


def check_tasks(config: RunConfig) -> None:
    """Check that this machine can run episodes as configured. Changes nothing.

    Raises:
        UserError: a check failed.
    """
    check_consistency(config)
    check_extensions(config)
    served_here = config.inference.external_url is None
    if served_here and config.inference.num_replicas == 0:
        raise UserError("inference.num_replicas = 0: no replica would serve the policy", "set it to 1 or more")
    check_engine_variables()
    check_socket_paths(config)
    check_ports(config)
    check_disk_not_full(RunDir(config.run_dir))
    check_file_system(config)
    if served_here:
        _check_model(config)
    from deskrl.actor.agent import conversation

    conversation.Agent(config.agent)
    from deskrl.actor import materialize_tasks

    materialize_tasks.load(config)
    from deskrl.actor.desktops import provider_registry

    provider_registry.check_usable(config.desktop)
    if provider_registry.select_provider(config.desktop).provider.is_tried_before_run:
        from deskrl.actor import desktop_check

        desktop_check.try_desktop(config)


def _check_model(config: RunConfig) -> None:
    """Check that this machine can serve the model; raises UserError."""
    check_packages("inference")
    if gpu_assignment.needs_gpus(config):
        from deskrl.learner import accelerator

        gpu_assignment.check_gpus_exist(config, accelerator.num_gpus())
    if config.model.path is not None:
        model_checks.check_complete(config.model.path, config.model.architecture)
    else:
        from deskrl.learner.policy import build_model

        build_model.check_buildable(config)
    image_sizing = inputs.read_model(config).image_sizing
    batch_sizes.check_limits(config, image_sizing.num_tokens(*config.image_size))


def check_consistency(config: RunConfig) -> None:
    """Check that the values of the configuration are consistent with one another; raises UserError."""
    for contradiction in (*_contradictions(config), *gpu_assignment.contradictions(config)):
        raise UserError(contradiction, "change one of these keys")
    from deskrl.actor.agent import model_fit

    model_fit.check_language(config)


def check_learner(config: RunConfig) -> None:
    """Check that the policy can be trained, not only evaluated; raises UserError."""
    if (url := config.inference.external_url) is not None:
        raise UserError(
            f"inference.external_url = {url}: an external server cannot be trained, because it accepts no weights and "
            "returns no token ids, logprobs or policy versions",
            "unset it, or use `deskrl eval`",
        )
    model_checks.check_not_quantized(config)


def check_packages(role: str) -> None:
    """Check that the packages of a role are installed; raises UserError."""
    for package in ENGINES[role]:
        _check_package(package, role)


def _check_package(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise missing_package(package, extra)


def check_ports(config: RunConfig) -> None:
    """Check that every role can listen on its address and is not exposed without authentication; raises UserError."""
    rpc.check_exposure(config.replay.listen_address)
    rpc.check_exposure(config.inference.listen_address(0))
    for key, host, port in endpoints(config):
        if (cause := bind_error(host, port)) is not None:
            raise listen_error(key, host, port, cause)


def check_socket_paths(config: RunConfig, roles: Collection[str] = ("actor", "inference")) -> None:
    """Check that the paths of all Unix sockets of these roles are short enough; raises UserError."""
    root = temporary_folder(RunDir(config.run_dir))
    if "actor" in roles:
        from deskrl.actor import main as actor

        if (path := actor.longest_socket_path(config, root)) is not None:
            check_socket_path(path)
    if "inference" in roles and config.inference.external_url is None:
        from deskrl.inference import main as inference

        check_socket_path(inference.longest_socket_path(config, root))


def check_disk_not_full(folder: RunDir) -> None:
    """Check that the disk of the run directory has MIN_FREE_BYTES left; raises UserError."""
    free_bytes = _free_bytes(folder)
    if free_bytes < MIN_FREE_BYTES:
        raise UserError(
            f"the disk of {folder.root} is full: {free_bytes // 1024**2} MiB free, "
            f"at least {MIN_FREE_BYTES // 1024**2} MiB are needed",
            "free disk space and repeat the command; no acknowledged episode is lost",
        )


def check_disk_space(folder: RunDir, learner: LearnerConfig, checkpoint_bytes: int, merged_bytes: int = 0) -> None:
    """Check that the disk has room for all checkpoints that the run will hold at once.

    Args:
        folder: run directory.
        learner: configuration of the learner.
        checkpoint_bytes: size of a checkpoint.
        merged_bytes: size of the merged model by which an adapter is verified at the end; 0: there is none.

    Raises:
        UserError: it does not.
    """
    num_present = len(list(folder.checkpoints.glob("epoch_*")))
    num_missing = footprint.max_checkpoints(learner) - num_present
    free_bytes = _free_bytes(folder)
    if free_bytes < num_missing * checkpoint_bytes + merged_bytes:
        merged = f", and {merged_bytes / 1e9:.0f} GB for the merged model (learner.verify_checkpoint)"
        raise UserError(
            f"the disk of {folder.root} has {free_bytes / 1e9:.0f} GB free, but {num_missing} more checkpoints of "
            f"{checkpoint_bytes / 1e9:.0f} GB are needed (learner.keep_checkpoints = {learner.keep_checkpoints}, "
            f"plus the one being written){merged if merged_bytes else ''}",
            "choose another disk with --runs, free disk space, or lower learner.keep_checkpoints",
        )


def _free_bytes(folder: RunDir) -> int:
    existing = next(path for path in (folder.root, *folder.root.parents) if path.exists())
    return shutil.disk_usage(existing).free


def endpoints(config: RunConfig) -> Iterator[Endpoint]:
    """Yield every address on which the roles of a run will listen; ports of replicas and actors count up."""
    num_replicas = config.inference.num_replicas
    for key, addresses in (
        ("replay.address", [config.replay.listen_address]),
        ("inference.address", [config.inference.listen_address(index) for index in range(num_replicas)]),
    ):
        yield from (Endpoint(key, address.host, address.port) for address in addresses)
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
    key_by_port: dict[int, str] = {}
    for endpoint in endpoints(config):
        if (other := key_by_port.setdefault(endpoint.port, endpoint.key)) != endpoint.key:
            yield f"{other} and {endpoint.key} both use port {endpoint.port}"
        if endpoint.port > 65535:
            yield f"{endpoint.key} counts up to port {endpoint.port}, above the maximum of 65535"
    if (config.agent.image_width is None) != (config.agent.image_height is None):
        yield "agent.image_width and agent.image_height must be set together"
    agent = config.agent
    if (agent.max_context_images or config.tasks.max_steps) > config.inference.max_images:
        limit = {
            "window": f"agent.window_images = {agent.window_images}",
            "segment": f"agent.segment_images = {list(agent.segment_images)}",
            "episode": f"tasks.max_steps = {config.tasks.max_steps}",
        }[agent.context]
        yield (
            f"{limit} allows more screenshots in one prompt (agent.context = {agent.context}) "
            f"than inference.max_images = {config.inference.max_images}"
        )
    if config.inference.max_action_tokens >= config.inference.max_model_len:
        yield (
            f"inference.max_action_tokens = {config.inference.max_action_tokens} leaves no room for a prompt in "
            f"inference.max_model_len = {config.inference.max_model_len}"
        )
