"""Benchmark of weight transfer to a replica against the plain transport, and of the throughput that an update costs.

Each round transfers the same bytes by the plain transport (NCCL broadcasts of the same buckets to an otherwise idle
process; copies on one device for `ipc`; a copy to a file in memory for `stream`), then by an update of deskrl with all
its parts: packing, transfer, checksums, loading, commit, canary. `ratio` is the time of the plain transport divided by
that of deskrl's transfer, median of the rounds; `ratio_whole` includes the time until the replica has paused. With
`--windows`, the throughput lost by an update under constant load is measured as well.

    python tests/bench/gpu_weights.py --engine nccl --model 7b --windows 2          # two GPUs
    python tests/bench/gpu_weights.py --engine ipc --model 7b --windows 2           # one GPU
    python tests/bench/gpu_weights.py --engine stream --model tiny --device cpu     # no GPU
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kit"))

import torch
from inference_kit import CORPUS, IMAGE_SIZE, act_request, replica_config, running_replica, user
from PIL import Image
from ports_kit import free_port
from torch import Tensor
from weight_update_kit import ChangingModel, load_changing_model

from deskrl.core import ids, rpc
from deskrl.core.config import ModelConfig, RunConfig
from deskrl.core.process_lifecycle import StopEvent
from deskrl.core.weights.buckets import BUCKET_BYTES, Bucket, plan_buckets
from deskrl.learner.policy.random_weight_model import UI_TARS_7B, build_random_weight_model
from deskrl.learner.weights.bucket_sender import BucketSender
from deskrl.learner.weights.manifest import PublishOutcome, tensor_specs
from deskrl.learner.weights.publisher import Publisher
from deskrl.proto.v1 import common_pb2, inference_pb2_grpc

SCREEN = (1280, 720)
NUM_SCREENSHOTS = 64
MAX_TOKENS = 64
_started_s = time.perf_counter()


def say(*words: object) -> None:
    """Print progress to standard error."""
    print(f"[{time.perf_counter() - _started_s:6.1f} s]", *words, file=sys.stderr, flush=True)


# The plain transport.


def bare_copies(sizes: list[int], device: torch.device) -> Callable[[], float]:
    """Return a function that copies buckets on one GPU and returns the seconds."""
    source = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def measure() -> float:
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        for size in sizes:
            target[:size].copy_(source[:size])
        torch.cuda.synchronize()
        return time.perf_counter() - began_s

    return measure


def bare_file(num_bytes: int) -> Callable[[], float]:
    """Return a function that copies bytes to a file in memory and returns the seconds."""

    def measure() -> float:
        data = memoryview(bytes(min(num_bytes, 256 * 1024**2)))
        handle = os.memfd_create("copy")
        try:
            began_s = time.perf_counter()
            missing = num_bytes
            while missing:
                missing -= os.write(handle, data[:missing])
            return time.perf_counter() - began_s
        finally:
            os.close(handle)

    return measure


class BareNccl:
    """NCCL broadcasts of the buckets to an otherwise idle process on another GPU."""

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes
        port = free_port()
        command = [sys.executable, __file__, "--peer", str(port), "--sizes", json.dumps(sizes)]
        self._peer = subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu(1)}, stdin=subprocess.PIPE)
        self._slots = join_bare(port, 0, sizes)

    def __call__(self) -> float:
        assert self._peer.stdin is not None
        self._peer.stdin.write(b"\n")
        self._peer.stdin.flush()
        return broadcast_all(self._slots, self._sizes)

    def close(self) -> None:
        """Terminate the peer."""
        assert self._peer.stdin is not None
        self._peer.stdin.close()
        torch.distributed.destroy_process_group()  # returns only after both sides have called it
        self._peer.wait(timeout=60)


def join_bare(port: int, rank: int, sizes: list[int]) -> list[Tensor]:
    """Join a warmed-up NCCL process group of two; return the buffers."""
    torch.cuda.set_device(0)
    where = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("nccl", init_method=where, rank=rank, world_size=2)
    slots = [torch.zeros(max(sizes), dtype=torch.uint8, device="cuda") for _ in range(2)]
    broadcast_all(slots, sizes[:3])
    return slots


def broadcast_all(slots: list[Tensor], sizes: list[int]) -> float:
    """Broadcast all buckets; return the seconds from the moment both sides are ready."""
    torch.distributed.all_reduce(torch.zeros(1, device="cuda"))
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    for number, size in enumerate(sizes):
        torch.distributed.broadcast(slots[number % 2][:size], src=0)
    torch.cuda.synchronize()
    return time.perf_counter() - began_s


def run_peer(port: int, sizes: list[int]) -> None:
    """Run the receiving side: one pass for each line on standard input."""
    slots = join_bare(port, 1, sizes)
    for _ in sys.stdin:
        broadcast_all(slots, sizes)
    torch.distributed.destroy_process_group()


# The update.


@dataclass
class LearnerSide:
    """Model and publisher of the learner's side."""

    model: ChangingModel
    publisher: Publisher
    outcomes: list[PublishOutcome]

    def update(self) -> tuple[PublishOutcome, float]:
        """Publish new weights; return the outcome and the seconds from begin to commit."""
        manifest = self.model.next_manifest()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began_s = time.perf_counter()
        self.publisher.publish(manifest, self.model.source)
        update_s = time.perf_counter() - began_s
        return self.outcomes[-1], update_s


def make_learner_side(config: RunConfig, device: torch.device, image_size: tuple[int, int]) -> LearnerSide:
    """Create the learner's side, without training."""
    outcomes: list[PublishOutcome] = []
    sender = BucketSender(device) if device.type == "cuda" else None
    # The canary's difference is printed, not checked.
    publisher = Publisher(config.inference, sender, float("inf"), StopEvent(), outcomes.append, tuple)
    return LearnerSide(load_changing_model(config, device, image_size), publisher, outcomes)


# The load.


def screenshots(size: tuple[int, int]) -> list[common_pb2.Image]:
    """Return images with edges and uniform areas, like those of screens."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for _ in range(NUM_SCREENSHOTS):
        blocks = torch.randint(0, 256, (9, 16, 3), generator=generator, dtype=torch.uint8)
        buffer = io.BytesIO()
        Image.fromarray(blocks.numpy()).resize(size, Image.Resampling.NEAREST).save(buffer, "PNG")
        images.append(common_pb2.Image(hash=ids.image_hash(buffer.getvalue()), data=buffer.getvalue()))
    return images


class Load:
    """Endless requests from a background thread; records the time and the number of tokens of each response."""

    def __init__(self, address: str, concurrency: int, images: list[common_pb2.Image]) -> None:
        self._address = address
        self._concurrency = concurrency
        self._images = images
        self._seeds = itertools.count()
        self._answers: list[tuple[float, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    async def _run(self) -> None:
        async with rpc.connect(self._address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            callers = [asyncio.create_task(self._call(stub)) for _ in range(self._concurrency)]
            await asyncio.gather(*callers)

    async def _call(self, stub: Any) -> None:
        while not self._stop.is_set():
            seed = next(self._seeds)
            image = self._images[seed % len(self._images)]
            request = act_request([user("Go on.", image)], [image], max_tokens=MAX_TOKENS, seed=seed)
            reply = await stub.Act(request, timeout=300)
            self._answers.append((time.perf_counter(), len(reply.action.action_ids)))

    def num_tokens(self, start_s: float, end_s: float) -> int:
        """Return the number of tokens of the responses between two times."""
        return sum(num for at_s, num in list(self._answers) if start_s <= at_s < end_s)


def measure_window(load: Load, learner_side: LearnerSide, window_s: float) -> dict[str, Any]:
    """Measure a window of constant load with an update in the middle, against the rate of its outer quarters."""
    start_s = time.perf_counter()
    time.sleep(window_s / 2)
    outcome, update_s = learner_side.update()
    time.sleep(max(0.0, start_s + window_s - time.perf_counter()))
    end_s, quarter_s = start_s + window_s, window_s / 4
    unaffected = load.num_tokens(start_s, start_s + quarter_s) + load.num_tokens(end_s - quarter_s, end_s)
    rate = unaffected / (2 * quarter_s)
    return {
        "lost_s": round(window_s - load.num_tokens(start_s, end_s) / rate, 3),
        "update_s": round(update_s, 3),
        "tokens_per_s": round(rate, 1),
        "num_requests_kept": outcome.num_requests_kept,
        "phases_ms": {name: round(ms, 1) for name, ms in outcome.phases_ms.items()},
    }


# The program.


def gpu(number: int) -> str:
    """Return the identifier for `CUDA_VISIBLE_DEVICES` of a GPU, numbered among the initially visible ones."""
    visible = os.environ.get("DESKRL_BENCH_GPUS") or os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else ["0", "1"]
    return names[number].strip()


def build(options: argparse.Namespace, scratch: Path) -> Path:
    """Return the model folder; build it if it is missing."""
    if options.model == "7b":
        folder = options.folder or scratch / "7b"
        if not (folder / "model.safetensors.index.json").exists():
            say("building a model of 7B shape (16 GB) in", folder)
            build_random_weight_model(folder, 0, UI_TARS_7B, max(SCREEN), CORPUS * 20)
        return folder
    if options.model == "tiny":
        return replica_config(scratch, 1).model_folder
    return Path(options.model)


def configure(options: argparse.Namespace, scratch: Path, model: Path) -> RunConfig:
    """Return the run configuration of the replica."""
    big = options.model != "tiny"
    settings: dict[str, Any] = {
        "weight_transfer": options.engine,
        "max_concurrent_requests": max(8, options.concurrency),
    }
    if big:
        settings |= {
            "dtype": "bfloat16",
            "max_model_len": 32768,
            "kv_cache_bytes": 24 * 1024**3,
            "image_cache_bytes": 1024**3,
            "gpu_memory_utilization": 0.4 if options.engine == "ipc" else 0.85,
        }
    config = replica_config(scratch, free_port(), **settings)
    if options.device == "cuda":
        needed = {"structured_outputs_config": {"backend": "guidance"}}
        arguments = needed | config.inference.engine_args
        inference = config.inference.model_copy(update={"engine_args": arguments})
        config = config.model_copy(update={"inference": inference})
    return config.model_copy(update={"model": ModelConfig(path=model)})


@contextmanager
def plain_transport(options: argparse.Namespace, buckets: tuple[Bucket, ...], device: torch.device) -> Iterator[Any]:
    """Yield a function that transfers the same bytes by the plain transport and returns the seconds."""
    sizes = [bucket.num_bytes for bucket in buckets]
    if options.engine == "stream":
        yield bare_file(sum(sizes))
    elif options.engine == "ipc":
        yield bare_copies(sizes, device)
    else:
        with contextlib.closing(BareNccl(sizes)) as bare:
            yield bare


def measure(options: argparse.Namespace, config: RunConfig, device: torch.device, environment: dict[str, str]) -> Any:
    """Measure all rounds and windows."""
    log = config.runs / "replica.log"
    size = IMAGE_SIZE if options.model == "tiny" else SCREEN
    say("starting the replica; its log is", log)
    with running_replica(config, log, environment):
        say("the replica serves; loading the model of the learner's side")
        learner_side = make_learner_side(config, device, size)
        sizes = [spec.num_bytes for spec in tensor_specs(learner_side.model.source.checkpoint_parameters())]
        buckets = plan_buckets(sizes, BUCKET_BYTES)
        say(f"{sum(sizes) / 1e9:.2f} GB in {len(sizes)} tensors and {len(buckets)} buckets")
        learner_side.publisher.wait_for_replicas()
        with plain_transport(options, buckets, device) as bare:
            measured = [measure_round(learner_side, bare, buckets) for _ in range(1 + options.rounds)]
            rounds = measured[1:]  # the first is warm-up
        windows = []
        if options.windows:
            with Load(config.inference.address, options.concurrency, screenshots(size)) as load:
                say(f"{options.concurrency} callers; warming up")
                time.sleep(options.window_s / 3)
                for _ in range(options.windows):
                    windows.append(measure_window(load, learner_side, options.window_s))
                    say("window:", windows[-1])
        learner_side.publisher.close()
    return rounds, windows, sum(sizes)


def measure_round(learner_side: LearnerSide, bare: Callable[[], float], buckets: tuple[Bucket, ...]) -> dict[str, Any]:
    """Measure the plain transport, then an update."""
    bare_s = bare()
    outcome, update_s = learner_side.update()
    if not outcome.ok:
        raise SystemExit(f"the update failed: {outcome.error}")
    total = sum(bucket.num_bytes for bucket in buckets)
    phases_ms = dict(outcome.phases_ms)
    # A stream is measured from the first byte to the last checksum.
    transfer_s = phases_ms.get("transfer", outcome.receive_ms) / 1e3
    first = buckets[0].num_bytes if "transfer" in phases_ms and len(buckets) > 2 else 0
    bandwidth = (total - first) / transfer_s
    whole_s = (phases_ms.get("pause", 0.0) + phases_ms["load"]) / 1e3 if "transfer" in phases_ms else transfer_s
    found = {
        "bare_s": bare_s,
        "bare_gb_per_s": total / bare_s / 1e9,
        "gb_per_s": bandwidth / 1e9,
        "ratio": bandwidth * bare_s / total,
        "ratio_whole": bare_s / whole_s,
        "update_s": update_s,
        "canary_max_difference": outcome.canary_max_difference,
        "phases_ms": phases_ms,
    }
    say({key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()})
    return found


def summary(
    rounds: list[dict[str, Any]], windows: list[dict[str, Any]], num_bytes: int, options: Any
) -> dict[str, Any]:
    """Return the result to print."""
    keys = ("ratio", "ratio_whole", "gb_per_s", "bare_gb_per_s", "bare_s", "update_s", "canary_max_difference")
    medians = {key: round(statistics.median(found[key] for found in rounds), 4) for key in keys}
    phases = sorted({name for found in rounds for name in found["phases_ms"]})
    line: dict[str, Any] = {
        "bench": "gpu_weights",
        **medians,
        "ratios": [round(found["ratio"], 3) for found in rounds],
        "phases_ms": {
            name: round(statistics.median(found["phases_ms"].get(name, 0.0) for found in rounds), 2) for name in phases
        },
        "gigabytes": round(num_bytes / 1e9, 3),
        "engine": options.engine,
        "model": options.model,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
    }
    if windows:
        line |= {
            "lost_s": statistics.median(window["lost_s"] for window in windows),
            "window_s": options.window_s,
            "concurrency": options.concurrency,
            "windows": windows,
        }
    return line


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("nccl", "ipc", "stream"), default="nccl")
    parser.add_argument("--model", default="7b", help="7b, tiny or a model folder")
    parser.add_argument("--folder", type=Path, help="folder of the model of 7B shape; built if missing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=0, help="number of windows with an update under constant load")
    parser.add_argument("--window_s", type=float, default=60.0)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--peer", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Parse the arguments, measure and print the result."""
    options = parse()
    if options.peer:
        return run_peer(options.peer, options.sizes)
    environment: dict[str, str] = {}
    if options.device == "cuda":
        replica_gpu = gpu(1 if options.engine == "nccl" else 0)
        environment = {"CUDA_VISIBLE_DEVICES": replica_gpu}
        os.environ["DESKRL_BENCH_GPUS"] = ",".join([gpu(0), replica_gpu])
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu(0)
    device = torch.device("cuda:0" if options.device == "cuda" else "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        config = configure(options, Path(scratch), build(options, Path(scratch)))
        rounds, windows, num_bytes = measure(options, config, device, environment)
    print(json.dumps(summary(rounds, windows, num_bytes, options)))


if __name__ == "__main__":
    main()
