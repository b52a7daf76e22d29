"""A real inference replica for tests, the tiny model that it serves, and transformers' own forward pass beside it."""

from __future__ import annotations

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
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from ports_kit import free_port
from safetensors.torch import load_file

from deskrl.core import rendering, rpc
from deskrl.core.config import InferenceConfig, ModelConfig, RunConfig, dump_config
from deskrl.core.families import Architecture
from deskrl.core.ids import image_hash
from deskrl.learner.policy.tiny_model import build_tiny_model
from deskrl.proto.v1 import common_pb2, weights_pb2, weights_pb2_grpc
from deskrl.proto.v1 import inference_pb2 as pb

IMAGE_SIZE = (280, 168)
CORPUS = ["Action: click(start_box='(100,80)')", "Thought: I type the word hello. Action: type(content='hello')"]
START_TIMEOUT_S = 600.0
PEER = rpc.peer("actor", "test")
LEARNER = rpc.peer("learner", "test")


def screenshot(seed: int) -> common_pb2.Image:
    """Coloured noise, another one for each seed."""
    pixels = torch.randint(0, 256, (IMAGE_SIZE[1], IMAGE_SIZE[0], 3), generator=torch.Generator().manual_seed(seed))
    buffer = io.BytesIO()
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(buffer, "PNG")
    return common_pb2.Image(hash=image_hash(buffer.getvalue()), data=buffer.getvalue())


def system(text: str) -> pb.ChatMessage:
    """A system message."""
    return pb.ChatMessage(role=pb.MESSAGE_ROLE_SYSTEM, contents=[pb.Content(text=text)])


def user(*parts: str | common_pb2.Image) -> pb.ChatMessage:
    """A user message of texts and screenshots."""
    contents = [pb.Content(text=p) if isinstance(p, str) else pb.Content(image_hash=p.hash) for p in parts]
    return pb.ChatMessage(role=pb.MESSAGE_ROLE_USER, contents=contents)


def sampled(ids: Sequence[int]) -> pb.ChatMessage:
    """An earlier turn of the policy."""
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
    """A request as an actor makes it."""
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
    """The same model under transformers: what the engine is compared with."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self._processor = Qwen2VLImageProcessor.from_pretrained(folder)
        self.suppressed_ids = rendering.suppressed_ids(self.tokenizer, rendering.vocab_size_of(folder))
        self.sizing = rendering.image_sizing_of(folder)
        self.original = load_file(folder / "model.safetensors")

    def prompt_ids(self, messages: Sequence[pb.ChatMessage]) -> list[int]:
        """The expanded prompt, as the learner computes it."""
        rendered = rendering.render(messages, self.tokenizer)
        counts = [self.sizing.num_tokens(*IMAGE_SIZE)] * len(rendered.image_hashes)
        return rendering.expand_images(rendered.ids, rendering.image_token_id(self.tokenizer), counts)

    def logprobs(
        self,
        prompt_ids: Sequence[int],
        action_ids: Sequence[int],
        images: Sequence[common_pb2.Image],
        weights: Mapping[str, torch.Tensor],
        *,
        temperature: float | None = 1.0,
    ) -> list[float]:
        """Logprobs of an action after a prompt; temperature None: of the bare logits, nothing suppressed."""
        ids_1T = torch.tensor([[*prompt_ids, *action_ids]])
        pixels = self._processor([Image.open(io.BytesIO(image.data)) for image in images], return_tensors="pt")
        image_token = rendering.image_token_id(self.tokenizer)
        unexpected = self.model.load_state_dict({in_memory(n): t for n, t in weights.items()}, strict=False)[1]
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
        """The original weights, those below `prefix` moved enough to change every logprob."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) if prefix in name else tensor
            for name, tensor in self.original.items()
        }


def in_memory(name: str) -> str:
    """What transformers calls a tensor in memory whose name in checkpoints is `name`."""
    return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)


def announce(weights: Mapping[str, torch.Tensor]) -> list[weights_pb2.TensorSpec]:
    """The tensors of an update, as `UpdateBegin` announces them."""
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
    """Everything that a learner sends for one update."""
    opening: dict[str, Any] = {
        "peer": LEARNER,
        "version": common_pb2.PolicyVersion(lineage="test", step=step),
        "tensors": announce(weights),
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
    """Carry one update through as a learner does, and return its end."""
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
    """The next reply of an update; a stream that has ended raises its status."""
    reply = await call.read()
    if reply is grpc.aio.EOF:
        raise grpc.aio.AioRpcError(await call.code(), grpc.aio.Metadata(), grpc.aio.Metadata())
    assert isinstance(reply, weights_pb2.UpdateWeightsResponse)
    return reply


@dataclass(frozen=True)
class Replica:
    """A replica that serves."""

    config: RunConfig
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def address(self) -> str:
        """Of its gRPC services."""
        return self.config.inference.address

    def descendants(self) -> list[psutil.Process]:
        """The engine's processes."""
        return psutil.Process(self.process.pid).children(recursive=True)


def build_model(folder: Path, architecture: Architecture = "qwen2_5_vl") -> Path:
    """A tiny model that sees screenshots of IMAGE_SIZE."""
    build_tiny_model(folder, seed=0, image_size=IMAGE_SIZE, corpus=CORPUS * 20, architecture=architecture)
    return folder


def replica_config(folder: Path, port: int, model: Path | None = None, **inference: Any) -> RunConfig:
    """A run whose replica serves a model; without one the tiny model, which is built if it is not there."""
    if model is None and not (model := folder / "model").exists():
        build_model(model)
    settings: dict[str, Any] = {
        "address": f"127.0.0.1:{port}",
        "dtype": "float32",
        "max_model_len": 2048,
        "max_images": 4,
        "max_concurrent": 8,
        "kv_cache_bytes": 128 * 1024**2,
        "image_cache_bytes": 64 * 1024**2,
        "max_action_tokens": 400,
        # What vLLM needs to be told on a machine of its own kind.
        "engine_args": json.loads(os.environ.get("DESKRL_TEST_ENGINE_ARGS", "{}")),
    }
    section = InferenceConfig(**(settings | inference))
    return RunConfig(name="test", runs=folder, model=ModelConfig(path=model), inference=section)


def launch(config: RunConfig, log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a replica as deskrl starts it, without waiting for it; `environment` is what it alone sees."""
    path = log.with_suffix(".json")
    dump_config(config, path)
    with open(log, "wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "deskrl.core.cli", "inference", str(path)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
        )


@contextmanager
def running_replica(config: RunConfig, log: Path, environment: Mapping[str, str] | None = None) -> Iterator[Replica]:
    """A replica that serves; ended by SIGTERM, unless the block ended it."""
    process = launch(config, log, environment)
    try:
        _wait_until_serving(config.inference.address, process, log)
        yield Replica(config, process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def _wait_until_serving(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once the replica answers SERVING; fail with its log if it ends instead, or takes too long."""
    request = health_pb2.HealthCheckRequest()
    deadline_s = time.monotonic() + START_TIMEOUT_S
    with rpc.connect_sync(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while process.poll() is None and time.monotonic() < deadline_s:
            with suppress(grpc.RpcError):
                stub.Check(request, timeout=1.0, wait_for_ready=True)
                return
    raise AssertionError(f"no replica (status {process.poll()}): {log.read_text()[-3000:]}")


@contextmanager
def temporary_replica(model: Path | None, max_concurrent: int) -> Iterator[RunConfig]:
    """A replica in a folder of its own, of the given model or the tiny one; the configuration that it serves by."""
    with tempfile.TemporaryDirectory() as folder:
        config = replica_config(Path(folder), free_port(), model, max_concurrent=max_concurrent)
        with running_replica(config, Path(folder) / "replica.log"):
            yield config
