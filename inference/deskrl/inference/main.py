"""The inference role: starts one replica and serves it until it is told to stop.

Knows the order of starting and stopping. What can be refused is refused before the engine starts, and the health
service answers SERVING only after a first action was sampled.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import psutil

from deskrl.core import lifetime, rpc
from deskrl.core.config import ModelConfig, RunConfig
from deskrl.core.errors import UserError
from deskrl.core.exposition import expose
from deskrl.core.model_folder import refuse_incomplete
from deskrl.inference.four_bit import four_bit_copy

if TYPE_CHECKING:
    from deskrl.inference.acting import PromptFormat
    from deskrl.inference.engine import Engine

_LOG = logging.getLogger(__name__)

_SERVICES = ("deskrl.proto.v1.InferenceService", "deskrl.proto.v1.WeightService")


def run(config: RunConfig, replica: int = 0) -> int:
    """Serve replica number `replica` until SIGTERM; returns the exit status.

    Raises:
        UserError: the model folder is incomplete, vLLM refuses the settings, or a port is taken.
    """
    folder = temporary_folder(config, replica)
    shutil.rmtree(folder, ignore_errors=True)
    # vLLM cannot be asked to stop while it starts, and has nothing to lose then.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _end_at_once(folder))
    lifetime.die_with_parent()
    address = config.inference.listen_address(replica)
    rpc.refuse_exposure(address)
    refuse_incomplete(config.model_folder)
    config = _served(config)
    _refuse_taken_ports(config, replica, address)
    folder.mkdir(mode=0o700)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        return asyncio.run(_serve(config, replica, address))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _served(config: RunConfig) -> RunConfig:
    """The configuration with the model that is really served: a 4-bit copy, where one is asked for."""
    if config.inference.quantization is None:
        return config
    copy = four_bit_copy(config.model_folder, config.folder / "model-int4")
    return config.model_copy(update={"model": ModelConfig(path=copy)})


def temporary_folder(config: RunConfig, replica: int) -> Path:
    """Where vLLM may leave its sockets; named so that a start clears away what a replica that was killed left there."""
    identity = f"{config.folder} {config.inference.replica_address(replica)}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:10]
    return Path(tempfile.gettempdir(), f"deskrl-inference-{digest}")


def _end_at_once(folder: Path) -> NoReturn:
    """End this process and all below it."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _refuse_taken_ports(config: RunConfig, replica: int, address: str) -> None:
    """Raise UserError now for what could otherwise not be listened on once the engine has started."""
    host, _, port = address.rpartition(":")
    counted_up = {
        "openai_port": (config.inference.openai_host, config.inference.openai_port),
        "metrics_port": (config.security.metrics_host, config.inference.metrics_port),
    }
    wanted = {"address": (host, int(port))}
    wanted |= {key: (at, first + replica) for key, (at, first) in counted_up.items() if first}
    for key, endpoint in wanted.items():
        try:
            socket.create_server(endpoint).close()
        except OSError as error:
            where = f"{endpoint[0]}:{endpoint[1]}"
            raise UserError(f"{where} cannot be listened on: {error.strerror}", f"change inference.{key}") from error


async def _serve(config: RunConfig, replica: int, address: str) -> int:
    """Start the engine, serve it, end it."""
    from deskrl.inference.acting import PromptFormat
    from deskrl.inference.engine import Engine
    from deskrl.inference.weights import checkpoint_shapes

    started_s = time.perf_counter()
    shapes = checkpoint_shapes(config.model_folder)
    prompt_format = PromptFormat(config.model_folder, _load_tokenizer(config.model_folder))
    engine = await Engine.start(config, prompt_format.facts)
    try:
        await _warm_up(engine, prompt_format)
        _LOG.info("the engine is up after %.1f s", time.perf_counter() - started_s)
        return await _serve_engine(config, replica, address, engine, prompt_format, shapes)
    finally:
        engine.shutdown()


async def _serve_engine(
    config: RunConfig,
    replica: int,
    address: str,
    engine: Engine,
    prompt_format: PromptFormat,
    shapes: Mapping[str, tuple[int, ...]],
) -> int:
    """Serve an engine that runs until it is time to stop; 1 if that was because it died."""
    from deskrl.inference.acting import InferenceServicer, Prompter
    from deskrl.inference.joining import announced
    from deskrl.inference.updating import WeightServicer
    from deskrl.proto.v1 import inference_pb2_grpc, weights_pb2_grpc

    stop = lifetime.stop_event()
    died = False

    def on_engine_death() -> None:
        nonlocal died
        died = True
        stop.set()

    prompter = Prompter(config, prompt_format)
    acting = InferenceServicer(config, engine, prompt_format, prompter, on_engine_death)
    gpu_uuids = await engine.gpu_uuids()
    updating = WeightServicer(engine, prompter, shapes, prompt_format.processor_hash, gpu_uuids, on_engine_death)
    async with contextlib.AsyncExitStack() as stack:
        if config.inference.openai_port:
            from deskrl.inference.openai import serve_openai

            port = config.inference.openai_port + replica
            endpoint = (config.inference.openai_host, port)
            await stack.enter_async_context(serve_openai(engine.llm, config.model_folder, config.name, endpoint))
        if config.inference.metrics_port:
            expose(config.security.metrics_host, config.inference.metrics_port + replica, "inference.metrics_port")
        server = rpc.make_server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(acting, server)
        weights_pb2_grpc.add_WeightServiceServicer_to_server(updating, server)
        health = await rpc.start_server(server, address, _SERVICES)
        _LOG.info("serving on %s", address)
        if config.inference.join:
            found_at = config.inference.replica_address(replica)
            await stack.enter_async_context(announced(config.replay.address, found_at, lambda: engine.version))
        await stop.wait_async()
        await health.enter_graceful_shutdown()
        await server.stop(grace=0)
    return 1 if died else 0


def _load_tokenizer(folder: Path):  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: the tokenizer cannot be loaded: {error}", "copy it from the original model"
        ) from error


async def _warm_up(engine: Engine, prompt_format: PromptFormat) -> None:
    """Sample once with a screenshot: the first request of an engine takes seconds."""
    from PIL import Image

    from deskrl.core.rendering import render
    from deskrl.inference.engine_input import Prompt
    from deskrl.proto.v1 import inference_pb2 as pb

    contents = [pb.Content(image_hash="warm-up"), pb.Content(text="warm-up")]
    prompt = render([pb.ChatMessage(role=pb.MESSAGE_ROLE_USER, contents=contents)], prompt_format.tokenizer)
    image = prompt_format.pixels.patches(Image.new("RGB", (224, 224)))
    await engine.sample(Prompt(prompt.ids, [("warm-up", image)]), temperature=1.0, max_tokens=2, seed=0, name="warm-up")
