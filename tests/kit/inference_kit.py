"""Inference replica for tests, the tiny model that it serves, and the forward pass of transformers as reference."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from ports_kit import free_port
from published_model_kit import to_published_format
from safetensors.torch import load_file

from deskrl.core import prompt_rendering, rpc
from deskrl.core.config import InferenceConfig, ModelConfig, RunConfig, dump_config
from deskrl.core.ids import image_hash
from deskrl.learner.policy.tiny_model import build_tiny_model
from deskrl.proto.v1 import common_pb2, inference_pb2_grpc, weights_pb2, weights_pb2_grpc
from deskrl.proto.v1 import inference_pb2 as pb

IMAGE_SIZE = (280, 168)
CORPUS = ["Action: click(start_box='(100,80)')", "Thought: I type the word hello. Action: type(content='hello')"]
START_TIMEOUT_S = 600.0
TOLERANCE = 5e-3 if torch.cuda.is_available() else 1e-4
"""Engine and reference both compute in float32, but in different order, and on a GPU with different kernels."""
PEER = rpc.peer("actor", "test")
LEARNER = rpc.peer("learner", "test")


def screenshot(seed: int) -> common_pb2.Image:
    """Return an image of coloured noise that depends on the seed."""
    pixels = torch.randint(0, 256, (IMAGE_SIZE[1], IMAGE_SIZE[0], 3), generator=torch.Generator().manual_seed(seed))
    buffer = io.BytesIO()
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(buffer, "PNG")
    return common_pb2.Image(hash=image_hash(buffer.getvalue()), data=buffer.getvalue())


def system(text: str) -> pb.ChatMessage:
    """Return a system message."""
    return pb.ChatMessage(role=pb.MESSAGE_ROLE_SYSTEM, contents=[pb.Content(text=text)])


def user(*parts: str | common_pb2.Image) -> pb.ChatMessage:
    """Return a user message of texts and screenshots."""
    contents = [pb.Content(text=p) if isinstance(p, str) else pb.Content(image_hash=p.hash) for p in parts]
    return pb.ChatMessage(role=pb.MESSAGE_ROLE_USER, contents=contents)


def sampled(ids: Sequence[int]) -> pb.ChatMessage:
    """Return an earlier action of the policy as a message."""
    contents = [pb.Content(token_ids=pb.TokenIds(ids=ids))]
    return pb.ChatMessage(role=pb.MESSAGE_ROLE_ASSISTANT, contents=contents)


def act_request(
    messages: Sequence[pb.ChatMessage],
    images: Sequence[common_pb2.Image] = (),
    *,
    temperature: float = 1.0,
    max_tokens: int = 12,
    seed: int = 1,
    **fields: Any,
) -> pb.ActRequest:
    """Return a request like those of an actor."""
    return pb.ActRequest(
        peer=PEER,
        request_id=f"test-{seed}",
        messages=messages,
        images=images,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        **fields,
    )


class Reference:
    """The same model in transformers, as reference for the engine."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self._processor: Any = AutoImageProcessor.from_pretrained(folder)
        self.suppressed_ids = prompt_rendering.suppressed_ids(self.tokenizer, prompt_rendering.read_vocab_size(folder))
        self.sizing = prompt_rendering.read_image_sizing(folder)
        self.original = load_file(folder / "model.safetensors")

    def prompt_ids(self, messages: Sequence[pb.ChatMessage]) -> list[int]:
        """Return the expanded prompt as the learner computes it."""
        rendered = prompt_rendering.render_prompt(messages, self.tokenizer)
        counts = [self.sizing.num_tokens(*IMAGE_SIZE)] * len(rendered.image_hashes)
        return prompt_rendering.expand_images(rendered.ids, prompt_rendering.image_token_id(self.tokenizer), counts)

    def logprobs(
        self,
        prompt_ids: Sequence[int],
        action_ids: Sequence[int],
        images: Sequence[common_pb2.Image],
        weights: Mapping[str, torch.Tensor],
        *,
        temperature: float | None = 1.0,
    ) -> list[float]:
        """Return the logprobs of an action after a prompt.

        Args:
            prompt_ids: expanded prompt.
            action_ids: action.
            images: screenshots of the prompt.
            weights: weights of the model, with the names of a checkpoint.
            temperature: sampling temperature; None for the unchanged logits without suppression of tokens.
        """
        ids_1T = torch.tensor([[*prompt_ids, *action_ids]])
        pixels = self._processor([Image.open(io.BytesIO(image.data)) for image in images], return_tensors="pt")
        image_token = prompt_rendering.image_token_id(self.tokenizer)
        unexpected = self.model.load_state_dict({transformers_name(n): t for n, t in weights.items()}, strict=False)[1]
        assert not unexpected
        with torch.no_grad():
            logits_TV = self.model(
                input_ids=ids_1T, mm_token_type_ids=(ids_1T == image_token).int(), use_cache=False, **pixels
            ).logits[0]
        if temperature is not None:
            logits_TV[:, list(self.suppressed_ids)] = float("-inf")
            logits_TV /= temperature
        logprobs_TV = logits_TV.log_softmax(-1)
        first = len(prompt_ids) - 1
        return [float(logprobs_TV[first + i, token]) for i, token in enumerate(action_ids)]

    def perturbed(self, seed: int, prefix: str = "") -> dict[str, torch.Tensor]:
        """Return the original weights, with noise in those whose name contains `prefix` that changes every logprob."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) if prefix in name else tensor
            for name, tensor in self.original.items()
        }


def transformers_name(name: str) -> str:
    """Return the name in transformers' model of a tensor whose name in checkpoints is `name`."""
    if name.startswith(("model.language_model.", "model.visual.")):
        return name
    return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)


def announced_tensors(weights: Mapping[str, torch.Tensor]) -> list[weights_pb2.TensorSpec]:
    """Return the announcement of tensors in `UpdateBegin`."""
    specs = []
    for name, tensor in weights.items():
        data = tensor.numpy().tobytes()
        checksum = hashlib.sha256(data).hexdigest()
        dtype = str(tensor.dtype).removeprefix("torch.")
        specs.append(
            weights_pb2.TensorSpec(name=name, dtype=dtype, shape=tensor.shape, checksum=checksum, num_bytes=len(data))
        )
    return specs


def update_events(
    weights: Mapping[str, torch.Tensor], step: int, canary: weights_pb2.Canary | None = None, **begin: Any
) -> list[weights_pb2.UpdateWeightsRequest]:
    """Return all events that a learner sends for one update."""
    opening: dict[str, Any] = {
        "peer": LEARNER,
        "version": common_pb2.PolicyVersion(lineage="test", step=step),
        "tensors": announced_tensors(weights),
        "canary": canary,
    }
    data = b"".join(tensor.numpy().tobytes() for tensor in weights.values())
    chunks = [data[i : i + rpc.CHUNK_BYTES] for i in range(0, len(data), rpc.CHUNK_BYTES)]
    return [
        weights_pb2.UpdateWeightsRequest(begin=weights_pb2.UpdateBegin(**(opening | begin))),
        *(weights_pb2.UpdateWeightsRequest(chunk=chunk) for chunk in chunks),
        weights_pb2.UpdateWeightsRequest(commit=weights_pb2.UpdateCommit()),
    ]


async def send(
    stub: weights_pb2_grpc.WeightServiceStub, events: Sequence[weights_pb2.UpdateWeightsRequest]
) -> weights_pb2.UpdateCommitted:
    """Send one update as a learner does, and return the final response."""
    begin, *chunks, commit = events
    call = stub.UpdateWeights(timeout=120)
    await call.write(begin)
    assert (await _reply(call)).HasField("ready")
    for chunk in chunks:
        await call.write(chunk)
    if commit.HasField("commit"):
        assert (await _reply(call)).HasField("received")
    await call.write(commit)
    await call.done_writing()
    return (await _reply(call)).committed


async def _reply(call: Any) -> weights_pb2.UpdateWeightsResponse:
    """Return the next reply of an update; raises AioRpcError if the stream has ended."""
    reply = await call.read()
    if reply is grpc.aio.EOF:
        raise grpc.aio.AioRpcError(await call.code(), grpc.aio.Metadata(), grpc.aio.Metadata())
    assert isinstance(reply, weights_pb2.UpdateWeightsResponse)
    return reply


@dataclass(frozen=True)
class Replica:
    """Running replica."""

    config: RunConfig
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def address(self) -> str:
        """Address of the gRPC services."""
        return self.config.inference.address

    def descendants(self) -> list[psutil.Process]:
        """Return the processes of the engine."""
        return psutil.Process(self.process.pid).children(recursive=True)


def build_model(folder: Path, architecture: str = "qwen2_5_vl") -> Path:
    """Build a tiny model for screenshots of IMAGE_SIZE; return its folder."""
    build_tiny_model(folder, seed=0, image_size=IMAGE_SIZE, corpus=CORPUS * 20, architecture=architecture)
    return folder


def replica_config(folder: Path, port: int, model: Path | None = None, **inference: Any) -> RunConfig:
    """Return the configuration of a run with one replica.

    Args:
        folder: folder for runs and the tiny model.
        port: port of the replica.
        model: model folder; None for the tiny model, which is built if it does not exist.
        inference: further settings of the inference section.
    """
    if model is None and not (model := folder / "model").exists():
        build_model(model)
    settings: dict[str, Any] = {
        "address": f"127.0.0.1:{port}",
        "dtype": "float32",
        "max_model_len": 2048,
        "max_images": 4,
        "max_concurrent_requests": 8,
        "kv_cache_bytes": 128 * 1024**2,
        "image_cache_bytes": 64 * 1024**2,
        "max_action_tokens": 400,
        # Settings that vLLM needs on an unusual machine.
        "engine_args": json.loads(os.environ.get("DESKRL_TEST_ENGINE_ARGS", "{}")),
    }
    section = InferenceConfig(**(settings | inference))
    return RunConfig(name="test", runs=folder, model=ModelConfig(path=model), inference=section)


def launch(config: RunConfig, log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a replica as deskrl does, without waiting; `environment` is added to its environment variables."""
    path = log.with_suffix(".json")
    dump_config(config, path)
    with open(log, "wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "deskrl.cli.main", "inference", str(path)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
        )


@contextmanager
def running_replica(config: RunConfig, log: Path, environment: Mapping[str, str] | None = None) -> Iterator[Replica]:
    """Run a replica while the context is open; it is terminated with SIGTERM unless it has ended."""
    process = launch(config, log, environment)
    try:
        _wait_until_serving(config.inference.address, process, log)
        yield Replica(config, process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def _wait_until_serving(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the replica reports SERVING; fail with its log if it ends or does not start in time."""
    request = health_pb2.HealthCheckRequest()
    deadline_s = time.monotonic() + START_TIMEOUT_S
    with rpc.connect_sync(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while process.poll() is None and time.monotonic() < deadline_s:
            with suppress(grpc.RpcError):
                stub.Check(request, timeout=1.0, wait_for_ready=True)
                return
    raise AssertionError(f"the replica did not start (status {process.poll()}): {log.read_text()[-3000:]}")


@contextmanager
def temporary_replica(model: Path | None, max_concurrent_requests: int) -> Iterator[RunConfig]:
    """Run a replica in a temporary folder, with the given or the tiny model; yield its configuration."""
    with tempfile.TemporaryDirectory() as folder:
        config = replica_config(Path(folder), free_port(), model, max_concurrent_requests=max_concurrent_requests)
        with running_replica(config, Path(folder) / "replica.log"):
            yield config


class Client:
    """Client of both services of the replica."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.weights = weights_pb2_grpc.WeightServiceStub(channel)

    async def act(self, request: pb.ActRequest) -> pb.SampledAction:
        """Return the action of a request, which must succeed."""
        reply = await self.inference.Act(request, timeout=120)
        assert reply.WhichOneof("outcome") == "action"
        action: pb.SampledAction = reply.action
        return action

    async def step(self) -> int:
        """Return the step of the weights that the replica has."""
        status = await self.weights.GetWeightStatus(weights_pb2.GetWeightStatusRequest(peer=PEER), timeout=60)
        return int(status.version.step)


def check_published_architecture(architecture: str, folder: Path) -> None:
    """Serve a tiny model in the format of published ones, and compare it with transformers after each weight update."""
    model = to_published_format(build_model(folder / "model", architecture))
    config = replica_config(folder, free_port(), model)
    reference = Reference(config.model_folder)
    images = [screenshot(1), screenshot(2)]
    messages = [user("Open it.", images[0], "Then this:", images[1])]
    versions = {1: reference.original, 2: reference.perturbed(seed=1), 3: reference.perturbed(seed=2, prefix="visual")}

    async def scenario(address: str) -> dict[int, pb.SampledAction]:
        async with rpc.connect(address) as channel:
            client, actions = Client(channel), {}
            for step, weights in versions.items():
                await send(client.weights, update_events(weights, step))
                actions[step] = await client.act(act_request(messages, images))
            return actions

    with running_replica(config, folder / "replica.log") as running:
        actions = asyncio.run(scenario(running.address))
    for step, action in actions.items():
        assert list(action.prompt_ids) == reference.prompt_ids(messages)
        expected = reference.logprobs(action.prompt_ids, action.action_ids, images, versions[step])
        assert list(action.logprobs) == pytest.approx(expected, abs=TOLERANCE)
