"""Benchmark of the throughput of `Act` over gRPC against vLLM without a service, with the same sampled tokens.

The bare side is vLLM's AsyncLLM in this process with the same settings. It gets token ids and encoded screenshots,
which are decoded in threads. The other side is a separate replica. It gets conversations and encoded screenshots, as an
actor sends them. The order of the sides alternates between turns, and each turn has new screenshots. Prints one JSON
line; `ratio` is the throughput of the replica divided by that of the bare engine, median of the turns.

    python tests/bench/act.py [--turns 5] [--requests 48] [--concurrency 16] [--model FOLDER]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kit"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))

from inference_kit import act_request, system, temporary_replica, user
from screenshots_kit import desktop_screenshot
from vllm_peer_kit import BareVllm

from deskrl.core import ids, prompt_rendering, rpc
from deskrl.core.config import RunConfig
from deskrl.proto.v1 import common_pb2, inference_pb2, inference_pb2_grpc

MAX_TOKENS = 24
NUM_SCREENSHOTS = 2
"""Number of screenshots per conversation."""


@dataclass(frozen=True)
class Case:
    """One request as an Act request and as token ids with screenshots."""

    request: inference_pb2.ActRequest
    prompt_ids: Sequence[int]
    """Prompt with one image token per screenshot."""
    images: list[common_pb2.Image]
    seed: int


@dataclass(frozen=True)
class Turn:
    """Measurement of one side in one turn."""

    requests_per_s: float
    latencies_s: list[float]
    num_tokens: int
    """Number of tokens of prompts and actions, which is the same on both sides."""


def make_cases(config: RunConfig, first_seed: int, num_cases: int, size: tuple[int, int]) -> list[Case]:
    """Return requests of conversations with `NUM_SCREENSHOTS` new screenshots each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model_folder)
    cases = []
    for seed in range(first_seed, first_seed + num_cases):
        shots = [desktop_screenshot(seed * NUM_SCREENSHOTS + index, size) for index in range(NUM_SCREENSHOTS)]
        images = [common_pb2.Image(hash=ids.image_hash(data), data=data) for data in shots]
        messages = [system("You use a computer."), user(f"Task {seed}.", *images)]
        rendered = prompt_rendering.render_prompt(messages, tokenizer)
        cases.append(
            Case(
                request=act_request(messages, images, temperature=1.0, max_tokens=MAX_TOKENS, seed=seed),
                prompt_ids=rendered.ids,
                images=images,
                seed=seed,
            )
        )
    return cases


async def run_turn(cases: Sequence[Case], concurrency: int, answer: Callable[[Case], Awaitable[int]]) -> Turn:
    """Process all cases with the given concurrency."""
    latencies_s: list[float] = []
    pending = list(cases)
    num_tokens = 0

    async def process_cases() -> None:
        nonlocal num_tokens
        while pending:
            case = pending.pop()
            started_s = time.perf_counter()
            num_answered = await answer(case)  # a separate statement: `+=` would read the sum before the await
            num_tokens += num_answered
            latencies_s.append(time.perf_counter() - started_s)

    started_s = time.perf_counter()
    async with asyncio.TaskGroup() as workers:
        for _ in range(concurrency):
            workers.create_task(process_cases())
    return Turn(len(cases) / (time.perf_counter() - started_s), latencies_s, num_tokens)


def bare_answer(peer: BareVllm) -> Callable[[Case], Any]:
    """Return a function that sends a case to vLLM itself."""

    async def answer(case: Case) -> int:
        params = {"temperature": 1.0, "max_tokens": MAX_TOKENS, "seed": case.seed}
        sampled = await peer.sample(case.prompt_ids, case.images, params, f"bare-{case.seed}")
        return len(sampled.prompt_ids) + len(sampled.action_ids)

    return answer


def act_answer(stub: inference_pb2_grpc.InferenceServiceStub) -> Callable[[Case], Any]:
    """Return a function that sends a case to the replica."""

    async def answer(case: Case) -> int:
        reply = await stub.Act(case.request, timeout=300)
        return len(reply.action.prompt_ids) + len(reply.action.action_ids)

    return answer


async def measure(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all turns and return the report."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model_folder)
    suppressed_ids = prompt_rendering.suppressed_ids(tokenizer, prompt_rendering.read_vocab_size(config.model_folder))
    peer = BareVllm(config)
    sides: dict[str, list[Turn]] = {"bare": [], "act": []}
    try:
        await peer.suppress(suppressed_ids)
        async with rpc.connect(config.inference.address) as channel:
            answers = {
                "bare": bare_answer(peer),
                "act": act_answer(inference_pb2_grpc.InferenceServiceStub(channel)),
            }
            size = (options.width, options.height)
            for turn in range(-1, options.turns):  # the first turn warms up both sides and is not counted
                cases = make_cases(config, (turn + 1) * options.requests, options.requests, size)
                for side in sorted(sides, reverse=turn % 2 == 0):
                    result = await run_turn(cases, options.concurrency, answers[side])
                    if turn >= 0:
                        sides[side].append(result)
    finally:
        peer.shutdown()
    return describe(sides, options)


def describe(sides: dict[str, list[Turn]], options: argparse.Namespace) -> dict[str, Any]:
    """Return the report that is printed."""
    assert [t.num_tokens for t in sides["bare"]] == [t.num_tokens for t in sides["act"]], (
        "both sides must sample the same tokens"
    )
    ratios = [act.requests_per_s / bare.requests_per_s for act, bare in zip(sides["act"], sides["bare"], strict=True)]
    line: dict[str, Any] = {
        "bench": "act",
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "requests": options.requests,
        "concurrency": options.concurrency,
    }
    for side, turns in sides.items():
        latencies_s = [latency for turn in turns for latency in turn.latencies_s]
        line[f"{side}_requests_per_s"] = round(statistics.median(turn.requests_per_s for turn in turns), 2)
        line[f"{side}_p50_ms"] = round(statistics.median(latencies_s) * 1e3)
        line[f"{side}_p95_ms"] = round(statistics.quantiles(latencies_s, n=20)[-1] * 1e3)
    return line


def main() -> None:
    """Parse the options, measure, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--width", type=int, default=504)
    parser.add_argument("--height", type=int, default=280)
    parser.add_argument("--model", type=Path, help="model folder (default: the tiny model of the tests)")
    options = parser.parse_args()
    with temporary_replica(options.model, options.concurrency) as config:
        line = asyncio.run(measure(config, options))
    print(json.dumps(line))


if __name__ == "__main__":
    main()
