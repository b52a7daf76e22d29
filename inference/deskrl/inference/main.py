"""The inference role: starts one replica and serves it until it is told to stop.

Knows the order of starting and stopping. What can be refused is refused before the engine starts, and the health
service answers SERVING only after a first action was sampled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from deskrl.core import lifetime, rpc
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError

if TYPE_CHECKING:
    from deskrl.inference.acting import PromptFormat
    from deskrl.inference.engine import Engine

_LOG = logging.getLogger(__name__)

_SERVICES = ("deskrl.proto.v1.InferenceService", "deskrl.proto.v1.WeightService")

_MODEL_FILES = {
    "config.json": ("config.json",),
    "an image processor": ("preprocessor_config.json", "processor_config.json"),
    "a tokenizer": ("tokenizer.json",),
}


def run(config: RunConfig, replica: int = 0) -> int:
    """Serve replica number `replica` until SIGTERM; returns the exit status.

    Raises:
        UserError: the model folder is incomplete, vLLM refuses the settings, or a port is taken.
    """
    lifetime.die_with_parent()
    stop = lifetime.stop_event()
    address = replica_address(config.inference.address, replica)
    rpc.refuse_exposure(address)
    check_model_folder(config.model_folder)
    return asyncio.run(_serve(config, replica, address, stop))


def replica_address(address: str, replica: int) -> str:
    """Where replica number `replica` listens: the ports count up."""
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + replica}"


def check_model_folder(folder: Path) -> None:
    """Raise UserError unless the folder holds a model with its processor."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder", "set model.path, or build the model first: deskrl model CONFIG")
    for what, names in _MODEL_FILES.items():
        if not any((folder / name).is_file() for name in names):
            raise UserError(f"{folder} lacks {what} ({' or '.join(names)})", "copy it from the original model")


async def _serve(config: RunConfig, replica: int, address: str, stop: lifetime.StopEvent) -> int:
    from deskrl.inference.acting import InferenceServicer, Prompter, PromptFormat
    from deskrl.inference.engine import Engine
    from deskrl.inference.updating import WeightServicer
    from deskrl.inference.weights import checkpoint_shapes
    from deskrl.proto.v1 import inference_pb2_grpc, weights_pb2_grpc

    started_s = time.perf_counter()
    shapes = checkpoint_shapes(config.model_folder)
    prompt_format = PromptFormat(config.model_folder, _load_tokenizer(config.model_folder))
    engine = await Engine.start(config, prompt_format.suppressed_ids)
    failed = False

    def on_engine_death() -> None:
        nonlocal failed
        failed = True
        stop.set()

    try:
        await _warm_up(engine, prompt_format)
        prompter = Prompter(config, prompt_format)
        servicer = InferenceServicer(config, engine, prompt_format, prompter, on_engine_death)
        receiver = WeightServicer(engine, prompter, shapes, prompt_format.processor_hash, on_engine_death)
        async with contextlib.AsyncExitStack() as stack:
            if config.inference.openai_port:
                from deskrl.inference.openai import serve_openai

                port = config.inference.openai_port + replica
                await stack.enter_async_context(serve_openai(engine.llm, config.model_folder, config.name, port))
            if config.inference.metrics_port:
                _serve_metrics(config.inference.metrics_port + replica)
            server = rpc.make_server()
            inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
            weights_pb2_grpc.add_WeightServiceServicer_to_server(receiver, server)
            health = await rpc.start_server(server, address, _SERVICES)
            _LOG.info("serving on %s, %.1f s after start", address, time.perf_counter() - started_s)
            await stop.wait_async()
            await health.enter_graceful_shutdown()
            await server.stop(grace=0)
    finally:
        engine.shutdown()
    return 1 if failed else 0


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
    from deskrl.inference.engine import Prompt
    from deskrl.proto.v1 import inference_pb2 as pb

    contents = [pb.Content(image_hash="warm-up"), pb.Content(text="warm-up")]
    prompt = render([pb.ChatMessage(role=pb.MESSAGE_ROLE_USER, contents=contents)], prompt_format.tokenizer)
    image = Image.new("RGB", (224, 224))
    await engine.sample(Prompt(prompt.ids, [("warm-up", image)]), temperature=1.0, max_tokens=2, seed=0, name="warm-up")


def _serve_metrics(port: int) -> None:
    from prometheus_client import start_http_server

    try:
        start_http_server(port, addr="127.0.0.1")
    except OSError as error:
        raise UserError(f"127.0.0.1:{port} cannot be listened on: {error}", "choose another metrics_port") from error
