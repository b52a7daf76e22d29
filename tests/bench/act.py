"""`Act` over gRPC against the bare engine: the same conversations with screenshots, the same sampled tokens.

The bare side is vLLM's AsyncLLM in this process, at the same settings, given token ids, and screenshots as they come
off the wire, decoded beside it in threads. The other side is a replica of its own, given conversations and encoded
screenshots as an actor sends them. Turns alternate; every turn has screenshots that neither side has seen.
Prints one JSON line; `ratio` is the replica's throughput over the bare engine's, median of the turns.

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
from screenshots_kit import desktop_picture
from vllm_peer import Peer

from deskrl.core import ids, rendering, rpc
from deskrl.core.config import RunConfig
from deskrl.proto.v1 import common_pb2, inference_pb2, inference_pb2_grpc

MAX_TOKENS = 24
SCREENSHOTS = 2


@dataclass(frozen=True)
class Case:
    """One request in both forms."""

    request: inference_pb2.ActRequest
    prompt_ids: Sequence[int]
    """With one image token for each screenshot."""
    images: list[common_pb2.Image]
    seed: int


@dataclass(frozen=True)
class Turn:
    """One side's pass over the cases of a turn."""

    requests_per_s: float
    latencies_s: list[float]
    num_tokens: int
    """Of prompts and actions: the same on both sides."""


def make_cases(config: RunConfig, first_seed: int, num: int, size: tuple[int, int]) -> list[Case]:
    """Requests of conversations with `SCREENSHOTS` new screenshots each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model_folder)
    cases = []
    for seed in range(first_seed, first_seed + num):
        shots = [desktop_picture(seed * SCREENSHOTS + index, size) for index in range(SCREENSHOTS)]
        images = [common_pb2.Image(hash=ids.image_hash(data), data=data) for data in shots]
        messages = [system("You use a computer."), user(f"Task {seed}.", *images)]
        rendered = rendering.render(messages, tokenizer)
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
    """All cases, `concurrency` at a time."""
    latencies_s: list[float] = []
    waiting = list(cases)
    num_tokens = 0

    async def work() -> None:
        nonlocal num_tokens
        while waiting:
            case = waiting.pop()
            started_s = time.perf_counter()
            num_answered = await answer(case)  # first: a sum read before others finish would forget theirs
            num_tokens += num_answered
            latencies_s.append(time.perf_counter() - started_s)

    started_s = time.perf_counter()
    async with asyncio.TaskGroup() as workers:
        for _ in range(concurrency):
            workers.create_task(work())
    return Turn(len(cases) / (time.perf_counter() - started_s), latencies_s, num_tokens)


def bare_answer(peer: Peer) -> Callable[[Case], Any]:
    """Asks vLLM itself."""

    async def answer(case: Case) -> int:
        params = {"temperature": 1.0, "max_tokens": MAX_TOKENS, "seed": case.seed}
        sampled = await peer.sample(case.prompt_ids, case.images, params, f"bare-{case.seed}")
        return len(sampled.prompt_ids) + len(sampled.action_ids)

    return answer


def act_answer(stub: inference_pb2_grpc.InferenceServiceStub) -> Callable[[Case], Any]:
    """Asks the replica."""

    async def answer(case: Case) -> int:
        reply = await stub.Act(case.request, timeout=300)
        return len(reply.action.prompt_ids) + len(reply.action.action_ids)

    return answer


async def measure(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """All turns."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model_folder)
    suppressed_ids = rendering.suppressed_ids(tokenizer, rendering.vocab_size_of(config.model_folder))
    peer = Peer(config)
    sides: dict[str, list[Turn]] = {"bare": [], "act": []}
    try:
        await peer.suppress(suppressed_ids)
        async with rpc.connect(config.inference.address) as channel:
            answers = {
                "bare": bare_answer(peer),
                "act": act_answer(inference_pb2_grpc.InferenceServiceStub(channel)),
            }
            size = (options.width, options.height)
            for turn in range(-1, options.turns):  # the first warms both sides up, and is not counted
                cases = make_cases(config, (turn + 1) * options.requests, options.requests, size)
                for side in sorted(sides, reverse=turn % 2 == 0):
                    result = await run_turn(cases, options.concurrency, answers[side])
                    if turn >= 0:
                        sides[side].append(result)
    finally:
        peer.shutdown()
    return describe(sides, options)


def describe(sides: dict[str, list[Turn]], options: argparse.Namespace) -> dict[str, Any]:
    """The line that is printed."""
    assert [t.num_tokens for t in sides["bare"]] == [t.num_tokens for t in sides["act"]], "the same seeds, other tokens"
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
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--width", type=int, default=504)
    parser.add_argument("--height", type=int, default=280)
    parser.add_argument("--model", type=Path, help="a model folder; without it the tiny model of the tests")
    options = parser.parse_args()
    with temporary_replica(options.model, options.concurrency) as config:
        line = asyncio.run(measure(config, options))
    print(json.dumps(line))


if __name__ == "__main__":
    main()
