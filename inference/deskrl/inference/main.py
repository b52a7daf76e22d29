"""Entry point of the inference role: starts one replica and serves it until it is terminated.

Invalid configurations are rejected before the engine starts. The health service reports SERVING only after the engine
has sampled a first action.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import psutil

from deskrl.core import process_lifecycle, rpc
from deskrl.core.addresses import HostPort
from deskrl.core.config import ModelConfig, RunConfig
from deskrl.core.errors import UserError
from deskrl.core.foreign_variables import check_engine_variables
from deskrl.core.listening import bind_error, listen_error
from deskrl.core.metrics_server import serve_metrics
from deskrl.core.socket_paths import check_socket_path
from deskrl.inference.int4_quantization import check_processor, make_int4_copy
from deskrl.models.model_checks import check_complete

if TYPE_CHECKING:
    from deskrl.inference.inference_service import ModelProcessor
    from deskrl.inference.vllm_engine import VllmEngine

_log = logging.getLogger(__name__)

_SOCKET_NAME = "0" * 36
"""Name as long as those of vLLM's sockets, which are UUIDs."""
_SERVICES = ("deskrl.proto.v1.InferenceService", "deskrl.proto.v1.WeightService")


def run(config: RunConfig, replica: int = 0) -> int:
    """Serve one replica until SIGTERM.

    Args:
        config: run configuration.
        replica: index of the replica.

    Returns:
        The exit status: 1 if the engine died.

    Raises:
        UserError: the model folder is incomplete, vLLM rejects the settings, or a port is in use.
    """
    folder = temporary_dir(config, replica)
    shutil.rmtree(folder, ignore_errors=True)
    # vLLM cannot be stopped gracefully during its start, and nothing would be lost by killing it then.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _kill_all(folder))
    process_lifecycle.die_with_parent()
    address = config.inference.listen_address(replica)
    rpc.check_exposure(address)
    check_engine_variables()
    check_socket_path(folder / _SOCKET_NAME)
    check_complete(config.model_folder, config.model.architecture)
    config = _with_served_model(config)
    _check_ports_free(config, replica, address)
    folder.mkdir(mode=0o700)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    os.environ.pop("VLLM_RPC_BASE_PATH", None)  # would place vLLM's sockets elsewhere
    try:
        return asyncio.run(_serve(config, replica, address))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _with_served_model(config: RunConfig) -> RunConfig:
    """Return the configuration with the model that is served: the 4-bit copy if quantisation is enabled."""
    if config.inference.quantization is None:
        return config
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        check_processor()
    copy = make_int4_copy(config.model_folder, config.run_dir / "model-int4")
    return config.model_copy(update={"model": ModelConfig(path=copy)})


def temporary_dir(config: RunConfig, replica: int) -> Path:
    """Return the directory for the sockets of vLLM.

    Its name depends only on the run and the address of the replica, so that a restart finds and removes the files of a
    replica that was killed. It is short, because the length of socket paths is limited.
    """
    identity = f"{config.run_dir} {config.inference.replica_address(replica)}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:10]
    return Path(tempfile.gettempdir(), f"deskrl-i-{digest}")


def longest_socket_path(config: RunConfig, root: Path) -> Path:
    """Return the longest path of a socket of the replicas, if `root` is the directory for temporary files."""
    return root / temporary_dir(config, 0).name / _SOCKET_NAME


def _kill_all(folder: Path) -> NoReturn:
    """Kill all descendants and exit."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _check_ports_free(config: RunConfig, replica: int, address: HostPort) -> None:
    """Raise UserError before the engine starts if a port cannot be bound."""
    endpoints = {"inference.address": (address.host, address.port)}
    if config.inference.openai_port:
        endpoints["inference.openai_port"] = (config.inference.openai_host, config.inference.openai_port + replica)
    if config.inference.metrics_port:
        endpoints["inference.metrics_port"] = (config.security.metrics_host, config.inference.metrics_port + replica)
    for key, (host, port) in endpoints.items():
        if (cause := bind_error(host, port)) is not None:
            raise listen_error(key, host, port, cause)


async def _serve(config: RunConfig, replica: int, address: str) -> int:
    """Start the engine, serve it, and shut it down."""
    from deskrl.inference.inference_service import ModelProcessor
    from deskrl.inference.vllm_engine import VllmEngine
    from deskrl.inference.weight_staging import checkpoint_shapes

    started_s = time.perf_counter()
    shapes = checkpoint_shapes(config.model_folder)
    model_processor = ModelProcessor(config.model_folder, _load_tokenizer(config.model_folder))
    engine = await VllmEngine.start(config, model_processor.model_spec)
    try:
        await _warm_up(engine, model_processor)
        _log.info("engine started in %.1f s", time.perf_counter() - started_s)
        return await _serve_engine(config, replica, address, engine, model_processor, shapes)
    finally:
        engine.shutdown()


async def _serve_engine(
    config: RunConfig,
    replica: int,
    address: str,
    engine: VllmEngine,
    model_processor: ModelProcessor,
    shapes: Mapping[str, tuple[int, ...]],
) -> int:
    """Serve a running engine until a stop is requested; return 1 if the engine died, else 0."""
    from deskrl.inference.inference_service import InferenceServicer, PromptBuilder
    from deskrl.inference.registration import register_replica
    from deskrl.inference.weight_service import WeightServicer
    from deskrl.proto.v1 import inference_pb2_grpc, weights_pb2_grpc

    stop = process_lifecycle.stop_event()
    has_died = False

    def on_engine_death() -> None:
        nonlocal has_died
        has_died = True
        stop.set()

    prompt_builder = PromptBuilder(config, model_processor)
    inference = InferenceServicer(config, engine, model_processor, prompt_builder, on_engine_death)
    gpu_uuids = await engine.gpu_uuids()
    weights = WeightServicer(engine, prompt_builder, shapes, model_processor.processor_hash, gpu_uuids, on_engine_death)
    async with contextlib.AsyncExitStack() as stack:
        if config.inference.openai_port:
            from deskrl.inference.openai_endpoint import serve_openai

            port = config.inference.openai_port + replica
            endpoint = (config.inference.openai_host, port)
            await stack.enter_async_context(serve_openai(engine.llm, config.model_folder, config.name, endpoint))
        if config.inference.metrics_port:
            port = config.inference.metrics_port + replica
            serve_metrics(config.security.metrics_host, port, "inference.metrics_port")
        server = rpc.make_server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server)
        weights_pb2_grpc.add_WeightServiceServicer_to_server(weights, server)
        health = await rpc.start_server(server, address, _SERVICES, "inference.address")
        _log.info("serving on %s", address)
        registration: contextlib.AbstractAsyncContextManager[None] = contextlib.nullcontext()
        if config.inference.join:
            reachable_at = config.inference.replica_address(replica)
            registration = register_replica(config.replay.address, reachable_at, lambda: engine.version)
        async with registration:  # a replica leaves before it stops serving
            await stop.wait_async()
        await health.enter_graceful_shutdown()
        await server.stop(grace=0)
    return 1 if has_died else 0


def _load_tokenizer(folder: Path):  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: the tokenizer cannot be loaded: {error}", "copy it from the original model"
        ) from error


async def _warm_up(engine: VllmEngine, model_processor: ModelProcessor) -> None:
    """Sample once with a screenshot, because the first request of an engine takes seconds."""
    from PIL import Image

    from deskrl.core.prompt_rendering import render_prompt
    from deskrl.inference.engine_prompt import EnginePrompt
    from deskrl.proto.v1 import inference_pb2 as pb

    contents = [pb.Content(image_hash="warm-up"), pb.Content(text="warm-up")]
    prompt = render_prompt([pb.ChatMessage(role=pb.MESSAGE_ROLE_USER, contents=contents)], model_processor.tokenizer)
    image = model_processor.patch_processor.patches(Image.new("RGB", (224, 224)))
    engine_prompt = EnginePrompt(prompt.ids, [("warm-up", image)])
    await engine.sample(engine_prompt, temperature=1.0, max_tokens=2, seed=0, name="warm-up")
