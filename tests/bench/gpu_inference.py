"""Benchmark of new and known screenshots per second: `Act` over gRPC against vLLM without a service, for many desktops.

Each turn has one concurrent request per desktop, with a short task and a new screenshot. Each side processes them, then
the same requests again (prompts and screenshots are then cached, and actors do not resend known screenshots). The order
of the sides alternates between turns. The peers are vLLM's AsyncLLM in this process, thus without transport, with the
run's settings for batches and memory and these documented settings of vLLM for images:

    cached    processor cache and encoder cache, one renderer thread: vLLM's default
    plain     as cached, the vision tower not compiled: also a default of vLLM
    parallel  eight renderer threads, which vLLM allows only without these caches
    sdpa      as plain, with PyTorch's attention in the vision tower: vLLM without FlashAttention

All peers pass a hash of each screenshot and decode in threads, with the renderer in threads of its own. All but the
last use the first encoder attention in vLLM's order of preference that runs on this machine, as deskrl does.

Prints progress, then one JSON line. `ratio` is deskrl's number of new screenshots per second divided by the best
peer's, median of the turns, and `warm_ratio` the same for known ones. `logprob_gap` is the difference between the
sides' logprobs of the same sampled tokens, `logprob_noise` that between two passes of one peer; if they are similar,
both sides sample from the same distribution. `stages_ms` is the median time of the stages of an Act with a new
screenshot.

    python tests/bench/gpu_inference.py [--turns 5] [--desktops 256] [--peers cached,sdpa] [--budget-s 420]
    python tests/bench/gpu_inference.py --model tiny --device cpu     # the program itself, on any machine
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kit"))

from inference_kit import CORPUS, act_request, replica_config, running_replica, system, user
from ports_kit import free_port
from screenshots_kit import desktop_screenshot
from vllm_peer_kit import BareOutput, BareVllm

from deskrl.core import ids, prompt_rendering, rpc
from deskrl.core.config import RunConfig
from deskrl.proto.v1 import common_pb2, inference_pb2, inference_pb2_grpc

KIT = Path(__file__).resolve().parent.parent / "kit"
PEERS: dict[str, dict[str, Any]] = {
    "cached": {},
    "plain": {"compilation_config": {}},
    "parallel": {"renderer_num_workers": 8, "mm_processor_cache_gb": 0},
    "sdpa": {"compilation_config": {}, "mm_encoder_attn_backend": "TORCH_SDPA"},
}
SIZE = {"7b": (1280, 720), "tiny": (504, 280)}
ENCODER_ATTENTION = ("FLASH_ATTN", "TRITON_ATTN", "TORCH_SDPA")
"""Encoder attentions in vLLM's order of preference on CUDA."""


@dataclass(frozen=True)
class Case:
    """One request, for deskrl and for a peer."""

    request: inference_pb2.ActRequest
    prompt_ids: Sequence[int]
    """Prompt with a single image token for the screenshot."""
    image: common_pb2.Image
    params: dict[str, Any]


@dataclass
class Pass:
    """Responses of one side to the cases of a turn."""

    requests_per_s: float
    answers: list[BareOutput]


@dataclass
class Side:
    """One of the compared engines."""

    name: str
    answer: Callable[[Case, bool], Awaitable[BareOutput]]
    new: list[Pass] = field(default_factory=list)
    warm: list[Pass] = field(default_factory=list)


STARTED_S = time.monotonic()


def say(text: str) -> None:
    """Print progress to standard error."""
    print(f"[{time.monotonic() - STARTED_S:6.1f} s] {text}", file=sys.stderr, flush=True)


class CaseMaker:
    """Makes new requests."""

    def __init__(self, model_folder: Path, size: tuple[int, int], max_tokens: int) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model_folder)
        self.suppressed_ids = prompt_rendering.suppressed_ids(
            self.tokenizer, prompt_rendering.read_vocab_size(model_folder)
        )
        self._size = size
        self._max_tokens = max_tokens

    def make(self, seeds: Sequence[int]) -> list[Case]:
        """Return one case per seed."""
        with ThreadPoolExecutor() as pool:
            pictures = list(pool.map(lambda seed: desktop_screenshot(seed, self._size), seeds))
        # Sequential: the tokenizer is not thread-safe.
        return [self._make(seed, data) for seed, data in zip(seeds, pictures, strict=True)]

    def _make(self, seed: int, data: bytes) -> Case:
        image = common_pb2.Image(hash=ids.image_hash(data), data=data)
        messages = [system("You use a computer."), user(f"Task {seed}: open the editor and type hello.", image)]
        rendered = prompt_rendering.render_prompt(messages, self.tokenizer)
        params: dict[str, Any] = {"temperature": 1.0, "max_tokens": self._max_tokens, "seed": seed}
        return Case(act_request(messages, [image], **params), rendered.ids, image, params)


def act_side(stub: inference_pb2_grpc.InferenceServiceStub, stages_ms: dict[str, list[float]]) -> Side:
    """Return the side of the replica; it records the time of the stages of requests with new screenshots."""

    async def answer(case: Case, known: bool) -> BareOutput:
        request = case.request
        if known:
            request = inference_pb2.ActRequest()
            request.CopyFrom(case.request)
            del request.images[:]
        started_s = time.perf_counter()
        action = (await stub.Act(request, timeout=300)).action
        total_ms = (time.perf_counter() - started_s) * 1e3
        if not known:
            parts = {name: getattr(action, f"{name}_ms") for name in ("image", "queue", "prefill", "decode")}
            parts["transport"] = total_ms - sum(parts.values())
            for name, part_ms in parts.items():
                stages_ms.setdefault(name, []).append(part_ms)
        return BareOutput(list(action.prompt_ids), list(action.action_ids), list(action.logprobs))

    return Side("deskrl", answer)


async def peer_side(name: str, peer: BareVllm, suppressed_ids: Sequence[int]) -> Side:
    """Return the side of a peer."""
    await peer.suppress(suppressed_ids)
    numbers = itertools.count()

    async def answer(case: Case, known: bool) -> BareOutput:
        return await peer.sample(case.prompt_ids, [case.image], case.params, f"bare-{next(numbers)}")

    return Side(name, answer)


async def run_pass(side: Side, cases: Sequence[Case], *, known: bool) -> Pass:
    """Run all cases concurrently."""
    started_s = time.perf_counter()
    answers = await asyncio.gather(*(side.answer(case, known) for case in cases))
    result = Pass(len(cases) / (time.perf_counter() - started_s), list(answers))
    num_tokens = sum(len(answer.action_ids) for answer in answers)
    kind = "known" if known else "new"
    say(f"{side.name:9} {kind:5} {result.requests_per_s:7.2f} requests/s, {num_tokens} tokens sampled")
    return result


async def run_turns(sides: Sequence[Side], maker: CaseMaker, options: argparse.Namespace) -> None:
    """Run the turns, as many as the time budget allows."""
    first = maker.make(range(min(32, options.desktops)))
    for side in sides:  # warm-up, not counted
        await run_pass(side, first, known=False)
    pending = asyncio.create_task(asyncio.to_thread(maker.make, _seeds(0, options)))
    for turn in range(options.turns):
        cases = await pending
        if turn + 1 < options.turns:
            # Generated between turns only, as it would take CPU time from both sides.
            pending = asyncio.create_task(asyncio.to_thread(maker.make, _seeds(turn + 1, options)))
            await asyncio.wait([pending])
        turn_started_s = time.monotonic()
        for side in sides if turn % 2 == 0 else sides[::-1]:
            side.new.append(await run_pass(side, cases, known=False))
            side.warm.append(await run_pass(side, cases, known=True))
        turn_s = time.monotonic() - turn_started_s
        if time.monotonic() + turn_s - STARTED_S > options.budget_s:
            say(
                f"{turn + 1} of {options.turns} turns: another would exceed the time budget of {options.budget_s:.0f} s"
            )
            break
    await asyncio.wait([pending])


def _seeds(turn: int, options: argparse.Namespace) -> range:
    first = 1000 + turn * options.desktops
    return range(first, first + options.desktops)


def describe(sides: Sequence[Side], stages_ms: dict[str, list[float]], options: argparse.Namespace) -> dict[str, Any]:
    """Return the result to print."""
    ours, *peers = sides
    line: dict[str, Any] = {
        "bench": "gpu_inference",
        "ratio": _ratio(ours.new, [peer.new for peer in peers]),
        "warm_ratio": _ratio(ours.warm, [peer.warm for peer in peers]),
        "model": options.model,
        "desktops": options.desktops,
        "max_tokens": options.max_tokens,
        "turns": len(ours.new),
        "encoder_attention": options.encoder_attention,
        "logprob_gap": gap(ours.new, peers[0].new),
        "logprob_noise": gap(peers[0].new, peers[0].warm),
        "stages_ms": {name: round(statistics.median(parts)) for name, parts in stages_ms.items()},
    }
    for side in sides:
        for kind, passes in (("new", side.new), ("warm", side.warm)):
            line[f"{side.name}_{kind}_per_s"] = [round(one.requests_per_s, 2) for one in passes]
    return line


def _ratio(ours: Sequence[Pass], peers: Sequence[Sequence[Pass]]) -> float:
    """Return the median over the turns of deskrl's rate divided by the best peer's."""
    best: list[float] = [max(one.requests_per_s for one in turn) for turn in zip(*peers, strict=True)]
    ratios = [mine.requests_per_s / other for mine, other in zip(ours, best, strict=True)]
    return round(statistics.median(ratios), 3)


def gap(one: Sequence[Pass], other: Sequence[Pass]) -> dict[str, float]:
    """Return the differences of logprobs of the same tokens, up to the first token at which two actions differ."""
    gaps: list[float] = []
    num_tokens = num_prompts = num_same_prompts = 0
    for left, right in zip(one, other, strict=True):
        for mine, theirs in zip(left.answers, right.answers, strict=True):
            num_prompts += 1
            num_same_prompts += mine.prompt_ids == theirs.prompt_ids
            num_tokens += len(mine.action_ids)
            same = itertools.takewhile(
                lambda row: row[0] == row[1],
                zip(mine.action_ids, theirs.action_ids, mine.logprobs, theirs.logprobs, strict=False),
            )
            gaps += [abs(row[2] - row[3]) for row in same]
    return {
        "mean": round(statistics.fmean(gaps), 5) if gaps else float("nan"),
        "max": round(max(gaps, default=float("nan")), 5),
        "same_tokens": round(len(gaps) / num_tokens, 3),
        "same_prompts": round(num_same_prompts / num_prompts, 3),
    }


def build_model(name: str, folder: Path) -> None:
    """Build the model folder unless it exists from an earlier run."""
    if (folder / "config.json").exists():
        say(f"using the model in {folder}")
        return
    from deskrl.learner.policy.random_weight_model import UI_TARS_7B, build_random_weight_model
    from deskrl.learner.policy.tiny_model import build_tiny_model

    say(f"building the model in {folder}")
    if name == "tiny":
        build_tiny_model(folder, 0, SIZE[name], CORPUS * 20)
    else:
        build_random_weight_model(folder, 0, UI_TARS_7B, max(SIZE[name]), CORPUS * 20)


def working_attention() -> str:
    """Return the first of vLLM's encoder attentions that runs on this machine and agrees with PyTorch's."""
    for name in ENCODER_ATTENTION[:-1]:
        probe = subprocess.run(
            [sys.executable, str(KIT / "attention_probe.py"), name], capture_output=True, text=True, check=False
        )
        if probe.returncode == 0:
            return name
        say(f"{name} does not run here: {(probe.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return ENCODER_ATTENTION[-1]


def run_config(options: argparse.Namespace, folder: Path) -> RunConfig:
    """Return the configuration that replica and peers share."""
    on_gpu = options.device == "cuda"
    engine_args = json.loads(options.engine_args)
    if on_gpu:
        engine_args.setdefault("mm_encoder_attn_backend", options.encoder_attention)
    return replica_config(
        folder,
        free_port(),
        options.folder,
        dtype="bfloat16" if on_gpu else "float32",
        max_model_len=32768 if on_gpu else 2048,
        max_images=2,
        max_concurrent_requests=options.desktops,
        max_action_tokens=options.max_tokens,
        gpu_memory_utilization=0.28,
        kv_cache_bytes=int(options.kv_gib * 1024**3),
        image_cache_bytes=8 * 1024**3 if on_gpu else 256 * 1024**2,
        engine_args=engine_args,
    )


@contextlib.contextmanager
def running_peers(config: RunConfig, log: Path, names: Sequence[str]) -> Iterator[dict[str, BareVllm]]:
    """Start the replica and the peers; yield the peers by name."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        say("starting the replica")
        replica = pool.submit(stack.enter_context, running_replica(config, log))
        peers = {}
        for name in names:
            say(f"starting vLLM ({name})")
            peers[name] = BareVllm(config, **PEERS[name])
            stack.callback(peers[name].shutdown)
        replica.result()
        say("all engines have started")
        yield peers


async def measure(config: RunConfig, peers: dict[str, BareVllm], maker: CaseMaker, options: argparse.Namespace) -> str:
    """Run all turns; return the result as JSON."""
    stages_ms: dict[str, list[float]] = {}
    async with rpc.connect(config.inference.address) as channel:
        sides = [act_side(inference_pb2_grpc.InferenceServiceStub(channel), stages_ms)]
        sides += [await peer_side(name, peer, maker.suppressed_ids) for name, peer in peers.items()]
        await run_turns(sides, maker, options)
    return json.dumps(describe(sides, stages_ms, options))


def main() -> None:
    """Parse the arguments, measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SIZE), default="7b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, help="model folder; built if missing")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--desktops", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--peers", default="cached", help="comma-separated list of " + ", ".join(PEERS))
    parser.add_argument("--encoder-attention", choices=("auto", *ENCODER_ATTENTION), default="auto")
    parser.add_argument("--engine-args", default="{}", help="engine arguments of vLLM for all sides, as JSON")
    parser.add_argument("--kv-gib", type=float, help="KV cache of each engine in GiB")
    parser.add_argument("--budget-s", type=float, default=420, help="time budget in seconds for all turns")
    options = parser.parse_args()
    options.kv_gib = options.kv_gib or (21 if options.device == "cuda" else 0.25)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(KIT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options.folder = options.folder or folder / "model"
        build_model(options.model, options.folder)
        if options.device == "cuda" and options.encoder_attention == "auto":
            options.encoder_attention = working_attention()
            say(f"encoder attention: {options.encoder_attention}")
        maker = CaseMaker(options.folder, SIZE[options.model], options.max_tokens)
        config = run_config(options, folder)
        with running_peers(config, folder / "replica.log", options.peers.split(",")) as peers:
            print(asyncio.run(measure(config, peers, maker, options)))


if __name__ == "__main__":
    main()
