"""Benchmark of the throughput that a weight update costs, and of the update's phases.

A replica samples under constant load; in the middle of each window its weights are replaced while requests continue.
The loss is the difference between the window's tokens and those expected from the rate of its first and last third,
which the update does not affect. The peer is the minimum that any update must do: copying the same bytes once, from
memory to a file in memory. Prints one JSON line; `ratio` is the time of the copy divided by the lost time, median of
the windows.

    python tests/bench/weight_update.py [--windows 5] [--window_s 60] [--concurrency 8] [--model FOLDER]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kit"))

from inference_kit import IMAGE_SIZE, Reference, act_request, screenshot, send, temporary_replica, user
from inference_kit import update_events as events_of

from deskrl.core import rpc
from deskrl.core.config import RunConfig
from deskrl.proto.v1 import inference_pb2_grpc, weights_pb2, weights_pb2_grpc

MAX_TOKENS = 24


@dataclass
class Load:
    """Endless requests; records the time and the number of tokens of each response."""

    stub: inference_pb2_grpc.InferenceServiceStub
    seeds: Any = field(default_factory=itertools.count)
    answers: list[tuple[float, int]] = field(default_factory=list)

    async def run(self) -> None:
        """Send requests one after another."""
        while True:
            seed = next(self.seeds)
            image = screenshot(seed)
            request = act_request([user("Go on.", image)], [image], max_tokens=MAX_TOKENS, seed=seed)
            reply = await self.stub.Act(request, timeout=300)
            self.answers.append((time.perf_counter(), len(reply.action.action_ids)))

    def num_tokens(self, start_s: float, end_s: float) -> int:
        """Return the number of tokens of the responses between two times."""
        return sum(num for at_s, num in self.answers if start_s <= at_s < end_s)


@dataclass(frozen=True)
class Window:
    """Measurements of one update under load."""

    lost_s: float
    """Lost throughput, in seconds of constant load."""
    update_s: float
    copy_s: float
    phases_ms: dict[str, float]
    num_requests_kept: int


def copy_s(num_bytes: int) -> float:
    """Return the seconds to copy a number of bytes to a file in memory."""
    data = os.urandom(num_bytes)
    handle = os.memfd_create("copy")
    try:
        started_s = time.perf_counter()
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]
        return time.perf_counter() - started_s
    finally:
        os.close(handle)


async def measure_window(
    load: Load, weights: weights_pb2_grpc.WeightServiceStub, events: list[Any], num_bytes: int, window_s: float
) -> Window:
    """Measure a window of constant load with an update in the middle."""
    start_s = time.perf_counter()
    await asyncio.sleep(window_s / 2)
    began_s = time.perf_counter()
    committed = await send(weights, events)
    update_s = time.perf_counter() - began_s
    await asyncio.sleep(start_s + window_s - time.perf_counter())
    third_s = window_s / 3
    unaffected = load.num_tokens(start_s, start_s + third_s) + load.num_tokens(
        start_s + 2 * third_s, start_s + window_s
    )
    rate = unaffected / (2 * third_s)
    return Window(
        lost_s=window_s - load.num_tokens(start_s, start_s + window_s) / rate,
        update_s=update_s,
        copy_s=copy_s(num_bytes),
        phases_ms=dict(committed.phases_ms),
        num_requests_kept=committed.num_requests_kept,
    )


async def measure(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all windows and return the result."""
    reference = Reference(config.model_folder)
    num_bytes = sum(tensor.nbytes for tensor in reference.original.values())
    windows = []
    async with rpc.connect(config.inference.address) as channel, asyncio.TaskGroup() as tasks:
        load = Load(inference_pb2_grpc.InferenceServiceStub(channel))
        callers = [tasks.create_task(load.run()) for _ in range(options.concurrency)]
        await asyncio.sleep(options.window_s / 3)  # warm-up
        for number in range(1, options.windows + 1):
            events: list[weights_pb2.UpdateWeightsRequest] = events_of(reference.perturbed(seed=number), step=number)
            stub = weights_pb2_grpc.WeightServiceStub(channel)
            windows.append(await measure_window(load, stub, events, num_bytes, options.window_s))
        for caller in callers:
            caller.cancel()
    return describe(windows, num_bytes, options)


def describe(windows: list[Window], num_bytes: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the result to print."""
    phases = {name for window in windows for name in window.phases_ms}
    return {
        "bench": "weight_update",
        "ratio": round(statistics.median(w.copy_s / max(w.lost_s, w.copy_s) for w in windows), 4),
        "lost_s": round(statistics.median(w.lost_s for w in windows), 3),
        "lost_s_each": [round(w.lost_s, 3) for w in windows],
        "lost_percent": round(100 * statistics.median(w.lost_s for w in windows) / options.window_s, 2),
        "update_s": round(statistics.median(w.update_s for w in windows), 4),
        "copy_s": round(statistics.median(w.copy_s for w in windows), 4),
        "megabytes": round(num_bytes / 1024**2, 1),
        "phases_ms": {n: round(statistics.median(w.phases_ms.get(n, 0.0) for w in windows), 1) for n in sorted(phases)},
        "num_requests_kept": [w.num_requests_kept for w in windows],
        "window_s": options.window_s,
        "concurrency": options.concurrency,
        "screenshot": IMAGE_SIZE,
    }


def main() -> None:
    """Parse the arguments, measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--window_s", type=float, default=60.0)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--model", type=Path, help="model folder; default: the tiny model of the tests")
    options = parser.parse_args()
    with temporary_replica(options.model, options.concurrency) as config:
        line = asyncio.run(measure(config, options))
    print(json.dumps(line))


if __name__ == "__main__":
    main()
