"""Benchmark of training on long screenshot histories: packed rows against padded rows with one row per step.

The episodes are synthetic (15 steps, one 1280 x 720 screenshot each, context `episode`), and the model has the shape of
UI-TARS-1.5-7B and random weights. Speed does not depend on their values.

deskrl: an optimizer step as the learner takes it, from encoded screenshots to the changed weights, under DeepSpeed
(ZeRO 1, frozen vision tower, AdamW in float32). All screenshots are new, so the vision tower encodes each of them.
Peer: the same model, kernels, loss and activation checkpointing; every step of an episode is a row with its own
screenshots, rows of similar length form a batch padded to the longest, and logits are computed at every position. The
peer only runs forward and backward passes: optimizer and screenshot decoding are omitted, in its favour.
Both sides process the same useful tokens: those of the episodes, each counted once. The device cannot hold the memory
of both sides, so they run one after another, the peer first.

Operations are those of the necessary matrix products, two per multiply-add, without recomputation in the backward pass.
With T tokens in rows of lengths L, N action tokens, W weights in the linear layers of the language model, H the number
of heads times their dimension, K layers, hidden size D, vocabulary size V:

    language   3 x (2 T W + K x 2 H x sum of L^2)       forward once, backward twice; causal attention counts half
    head       3 x 2 N D V
    vision     2 P W_v + sum over its layers of 4 D_v x sum of S^2, for P patches in windows of S patches; forward only

`rate_share` is the rate of these operations divided by that of one large bfloat16 matrix product in the same run.
Prints progress, then one JSON line. `ratio` is the median number of useful tokens per second divided by the peer's.
`logprob_difference` is the mean difference of both sides' logprobs of the same tokens under the same weights.

    python tests/bench/gpu_learner.py [--model 7b] [--device cuda] [--episodes 4] [--turns 5] [--profile FILE]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

# Prevents fragmentation of the allocator's memory by rows of different lengths.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kit"))

import torch
from learner_kit import SMALL_SHAPE
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from deskrl.core.config import GrpoConfig, LearnerConfig
from deskrl.core.ids import image_hash
from deskrl.core.lru_cache import SharedLRUCache
from deskrl.core.prompt_rendering import read_image_sizing, suppressed_ids
from deskrl.core.step_codec import Step, VersionSpan
from deskrl.learner import grpo
from deskrl.learner.batches.collator import MicroBatch
from deskrl.learner.batches.micro_batch_loader import MicroBatchLoader
from deskrl.learner.batches.packing import Row, pack
from deskrl.learner.episode_types import Trajectory
from deskrl.learner.group_filter import FilteredGroup
from deskrl.learner.metrics.update_stats import UpdateReport
from deskrl.learner.policy import activation_checkpointing, varlen_attention
from deskrl.learner.policy.deepspeed_engine import DeepSpeedEngine
from deskrl.learner.policy.policy_model import Policy, load_processor, make_collator
from deskrl.learner.policy.random_weight_model import UI_TARS_7B, write_config_and_processor

SIZE = (1280, 720)
OPENING_TOKENS, ACTION_TOKENS, CLOSING_TOKENS = 420, (30, 90), 5
TINY = replace(SMALL_SHAPE, max_pixels=100352)


@dataclass
class Case:
    """Episodes of one turn with their screenshots; every turn has new ones."""

    trajectories: list[Trajectory]
    shots: dict[str, bytes]

    def rows(self, share: bool = True) -> list[Row]:
        """Return one row per episode if `share` is True, otherwise one per step."""
        return [
            row
            for index, trajectory in enumerate(self.trajectories)
            for row in pack(index, trajectory.steps, [[0] * len(s.action_ids) for s in trajectory.steps], share)
        ]


@dataclass(frozen=True)
class Side:
    """Measurements of one side."""

    seconds: list[float]
    useful_tokens: list[int]
    peak_bytes: int

    @property
    def tokens_per_s(self) -> float:
        """Useful tokens per second, median over turns."""
        return statistics.median(n / s for n, s in zip(self.useful_tokens, self.seconds, strict=True))


def say(text: str) -> None:
    """Print progress to standard error."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


class BenchmarkSetup:
    """Model, device and synthetic episodes."""

    def __init__(self, options: argparse.Namespace, folder: Path, rank: int = 0, num_ranks: int = 1) -> None:
        from transformers import Qwen2_5_VLForConditionalGeneration

        self.options = options
        self.device = torch.device(options.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        shape = UI_TARS_7B if options.model == "7b" else TINY
        config = write_config_and_processor(folder, shape, max(SIZE), ["press the button and type a word"] * 8)
        self.processor = load_processor(folder)
        self.tokens_per_image = read_image_sizing(folder).num_tokens(*SIZE)
        suppressed = suppressed_ids(self.processor.tokenizer, shape.text["vocab_size"])
        torch.manual_seed(0)
        torch.set_default_dtype(self.dtype)
        with self.device:
            model = Qwen2_5_VLForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
        for parameter in model.parameters():  # not the buffers: positions need float32
            parameter.data = parameter.data.to(self.dtype)
        model.requires_grad_(True).model.visual.requires_grad_(False)
        self.policy = Policy(model, suppressed, SharedLRUCache(2 * 1024**3, attrgetter("num_bytes"))).to(self.device)
        activation_checkpointing.enable(model.model.language_model, options.activation_checkpointing)
        self.shots: dict[str, bytes] = {}
        self.loader = MicroBatchLoader(
            make_collator(self.policy, self.processor, self._fetch), rank, num_ranks, options.tokens, lambda: None
        )
        with self.without_features():
            self.pixel_collator = make_collator(self.policy, self.processor, self._fetch)
        self._generator = random.Random(0)

    def case(self, num_episodes: int) -> Case:
        """Return new episodes."""
        shots: dict[str, bytes] = {}
        trajectories = [self._episode(shots, reward=float(index % 2)) for index in range(num_episodes)]
        self.shots = shots
        return Case(trajectories, shots)

    @contextmanager
    def without_features(self) -> Iterator[None]:
        """Disable the cache of vision features while the context is open."""
        features, self.policy.features = self.policy.features, None
        yield
        self.policy.features = features

    def synchronise(self) -> float:
        """Wait for the device; return the time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_bytes(self) -> int:
        """Return the peak memory use of the device since the last call, in bytes."""
        if self.device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return int(peak)

    def _fetch(self, names: Any) -> Mapping[str, bytes]:
        return {name: self.shots[name] for name in names}

    def _episode(self, shots: dict[str, bytes], reward: float) -> Trajectory:
        tokenizer = self.processor.tokenizer
        start, pad, end = (
            tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "image_pad", "vision_end")
        )
        prompt, images, steps = self._words(OPENING_TOKENS), [], []
        for index in range(self.options.steps):
            data = self._screenshot()
            images.append(image_hash(data))
            shots[images[-1]] = data
            prompt += [start, *[pad] * self.tokens_per_image, end, *self._words(CLOSING_TOKENS)]
            action = self._words(self._generator.randint(*ACTION_TOKENS))
            spans = (VersionSpan("synthetic", 0, 0, len(action)),)
            logprobs = (-8.0,) * len(action)
            steps.append(Step(index, images[-1], tuple(images), "", tuple(prompt), tuple(action), logprobs, spans))
            prompt += action
        return Trajectory(images[0], "synthetic", reward, tuple(steps))

    def _words(self, num: int) -> list[int]:
        """Return random tokens other than special ones, which come first in the vocabulary."""
        return [self._generator.randrange(300, 1000) for _ in range(num)]

    def _screenshot(self) -> bytes:
        """Return a random screenshot of windows on a plain desktop."""
        draw = self._generator.randrange
        picture = Image.new("RGB", SIZE, (draw(256), draw(256), draw(256)))
        canvas = ImageDraw.Draw(picture)
        for _ in range(12):
            x, y = draw(SIZE[0]), draw(SIZE[1])
            canvas.rectangle((x, y, x + draw(40, 600), y + draw(20, 400)), fill=(draw(256), draw(256), draw(256)))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


# The peer.


def padded_batches(rows: Sequence[Row], max_tokens: int) -> Iterator[list[Row]]:
    """Yield batches of rows of similar length whose padded size fits; a row that does not fit has its own batch."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.token_ids)):
        if batch and (len(batch) + 1) * len(batch[0].token_ids) > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def pad(setup: BenchmarkSetup, rows: Sequence[Row]) -> MicroBatch:
    """Return a micro-batch of rows padded to the longest."""
    length = max(len(row.token_ids) for row in rows)
    padded = [replace(row, token_ids=(*row.token_ids, *[0] * (length - len(row.token_ids)))) for row in rows]
    return setup.pixel_collator.collate(padded)


def padded_logprobs(setup: BenchmarkSetup, micro: MicroBatch) -> Tensor:
    """Return logprobs of the action tokens, from logits at every position and without cached vision features."""
    micro = micro.to(setup.device)
    policy, body = setup.policy, setup.policy.model.model
    hidden_LD = body.language_model(
        inputs_embeds=policy._embed(micro)[None],
        position_ids=micro.position_ids_3L[:, None],
        attention_mask={"full_attention": None},
        use_cache=False,
        **varlen_attention.make_lengths(micro.row_lengths, setup.device).as_arguments(),
    ).last_hidden_state[0]
    logits_LV = policy.model.lm_head(hidden_LD).float().index_fill(1, policy.suppressed_ids, float("-inf"))
    return logits_LV.log_softmax(-1)[micro.position_N, micro.target_N]


def run_peer(setup: BenchmarkSetup) -> Side:
    """Run forward and backward passes over padded rows."""
    side = Side([], [], 0)
    for turn in range(setup.options.turns):  # `compare` has warmed up the device
        case = setup.case(setup.options.peer_episodes)
        batches = [pad(setup, rows) for rows in padded_batches(case.rows(share=False), setup.options.tokens)]
        began = setup.synchronise()
        with setup.without_features():
            for micro in batches:
                (-padded_logprobs(setup, micro).sum() / 1000.0).backward()
        side.seconds.append(setup.synchronise() - began)
        side.useful_tokens.append(sum(len(row.token_ids) for row in case.rows()))
        say(f"peer, turn {turn}: {side.seconds[-1]:.1f} s")
        setup.policy.zero_grad(set_to_none=True)
    return replace(side, peak_bytes=setup.peak_bytes())


def compare(setup: BenchmarkSetup) -> float:
    """Return the mean difference of both sides' logprobs of one episode's action tokens."""
    case = setup.case(1)
    with torch.no_grad(), setup.without_features():
        micro = setup.pixel_collator.collate(case.rows())
        packed = setup.policy(micro.to(setup.device), 1.0).logprobs_N
        padded = torch.cat([padded_logprobs(setup, pad(setup, [row])) for row in case.rows(share=False)])
    return float((packed - padded).abs().mean())


# deskrl.


def run_deskrl(setup: BenchmarkSetup, engine: DeepSpeedEngine) -> tuple[Side, float]:
    """Run optimizer steps; return the measurements and the median operations per second."""
    side, rates = Side([], [], 0), []
    for turn in range(setup.options.turns + 1):
        seconds, rows, report = optimizer_step(setup, engine)
        if turn:
            side.seconds.append(seconds)
            side.useful_tokens.append(sum(len(row.token_ids) for row in rows))
            rates.append(operations(setup, rows) / seconds)
        say(f"deskrl, turn {turn}: {seconds:.1f} s, loss {report.loss:.4f}, gradient norm {report.gradient_norm:.4f}")
        if not report.applied:
            raise SystemExit("the gradient is not finite")
    return replace(side, peak_bytes=setup.peak_bytes()), statistics.median(rates)


def optimizer_step(setup: BenchmarkSetup, engine: DeepSpeedEngine) -> tuple[float, Sequence[Row], UpdateReport]:
    """Take one optimizer step as the learner does; return its seconds, rows and report."""
    case = setup.case(setup.options.episodes)
    group = FilteredGroup("synthetic", "synthetic", tuple(case.trajectories))
    began = setup.synchronise()
    batch = grpo.build_training_batch([group], lambda span: 0, GrpoConfig())
    report = grpo.update(engine, setup.loader, batch, GrpoConfig(), num_updates=1)
    return setup.synchronise() - began, batch.rows, report


def operations(setup: BenchmarkSetup, rows: Sequence[Row]) -> float:
    """Return the useful operations of an optimizer step, by the formula in the module docstring."""
    config, model = setup.policy.model.config, setup.policy.model.model
    text, vision = config.text_config, config.vision_config
    lengths = [len(row.token_ids) for row in rows]
    language = 2 * sum(lengths) * linear_weights(model.language_model)
    language += 2 * text.num_hidden_layers * text.hidden_size * sum(length**2 for length in lengths)
    head = 2 * sum(len(row.targets) for row in rows) * text.hidden_size * text.vocab_size
    merge = vision.spatial_merge_size
    num_patches = setup.tokens_per_image * merge**2
    # The merger's layers process merged patches, a fraction of the positions.
    tower = 2 * num_patches * (linear_weights(model.visual) - (1 - 1 / merge**2) * linear_weights(model.visual.merger))
    tower += 2 * num_patches * model.visual.patch_embed.proj.weight.numel()
    window = (vision.window_size // vision.patch_size) ** 2  # patches; windows at the edges are smaller
    num_full = len(vision.fullatt_block_indexes)
    pairs = num_full * num_patches**2 + (vision.depth - num_full) * num_patches * window
    tower += 4 * vision.hidden_size * pairs
    num_images = sum(len(row.images) for row in rows)
    return 3.0 * (language + head) + num_images * tower


def linear_weights(module: torch.nn.Module) -> int:
    """Return the number of weights in linear layers, by which every position is multiplied."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, torch.nn.Linear))


# The machine.


def timed(setup: BenchmarkSetup, work: Callable[[], object], num: int) -> float:
    """Return the seconds of one call, from the fastest of three series of `num` calls."""
    work()
    best = float("inf")
    for _ in range(3):
        began = setup.synchronise()
        for _ in range(num):
            work()
        best = min(best, (setup.synchronise() - began) / num)
    return best


def matrix_rate(setup: BenchmarkSetup) -> float:
    """Return the operations per second of a large bfloat16 matrix product."""
    side = 8192 if setup.device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=setup.device, dtype=torch.bfloat16) for _ in range(2))
    return float(2 * side**3 / timed(setup, lambda: a @ b, 50))


def attention_rates(setup: BenchmarkSetup) -> dict[str, float]:
    """Return the operations per second, forward and backward, of PyTorch's attention kernels on an episode's row."""
    if setup.device.type != "cuda":
        return {}
    text, length = setup.policy.model.config.text_config, 19_000
    heads, dim = text.num_attention_heads, text.hidden_size // text.num_attention_heads
    shape = (1, heads, length, dim)
    q, k, v = (torch.randn(shape, device=setup.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    count = 7 * length**2 * heads * dim  # two products forward, five backward, half of each
    rates = {}
    for backend in (torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.CUDNN_ATTENTION):

        def work() -> None:
            scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

        began = setup.synchronise()
        try:
            with torch.nn.attention.sdpa_kernel(backend):
                work()
                first_s = setup.synchronise() - began
                rates[backend.name.lower()] = round(count / timed(setup, work, 3) / 1e12, 1)
        except RuntimeError as error:  # the kernel is not supported on this machine
            say(f"{backend.name}: {error}")
            continue
        say(f"{backend.name}: {rates[backend.name.lower()]} Tflop/s, first call {first_s:.2f} s")
    return rates


def write_profile(setup: BenchmarkSetup, engine: DeepSpeedEngine, path: Path) -> None:
    """Write the operators in which an optimizer step spends its time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if setup.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        seconds, rows, _ = optimizer_step(setup, engine)
    key = "self_cuda_time_total" if setup.device.type == "cuda" else "self_cpu_time_total"
    table = profile.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=90)
    num_tokens = sum(len(row.token_ids) for row in rows)
    path.write_text(
        f"one optimizer step: {len(rows)} rows, {num_tokens} tokens, {seconds:.2f} s under the profiler\n{table}\n"
    )
    say(f"profile in {path}")


def main() -> None:
    """Measure both sides and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("7b", "tiny"), default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--episodes", type=int, default=4, help="episodes per optimizer step")
    parser.add_argument("--steps", type=int, default=15, help="steps per episode")
    parser.add_argument("--peer_episodes", type=int, default=1, help="episodes per turn of the peer")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20480, help="tokens per micro-batch, on both sides")
    parser.add_argument("--activation-checkpointing", choices=("off", "selective", "full"), default="selective")
    parser.add_argument("--offload", action="store_true", help="keep the optimizer state in host memory")
    parser.add_argument("--profile", type=Path, help="write a profile of one optimizer step to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        setup = BenchmarkSetup(options, Path(folder))
        say(f"model initialised after {time.perf_counter() - began:.0f} s, {setup.peak_bytes() / 1e9:.1f} GB")
        rate = matrix_rate(setup)
        say(f"matrix rate {rate / 1e12:.1f} Tflop/s")
        attention_tflops = attention_rates(setup)
        difference = compare(setup)
        say(f"mean difference of logprobs {difference:.5f}")
        peer = run_peer(setup)
        engine = DeepSpeedEngine(setup.policy, learner_config(options, setup))
        say(f"engine ready, {setup.peak_bytes() / 1e9:.1f} GB")
        ours, operations_per_s = run_deskrl(setup, engine)
        if options.profile:
            write_profile(setup, engine, options.profile)
        engine.close()
    result = {
        "bench": "gpu_learner",
        "ratio": round(ours.tokens_per_s / peer.tokens_per_s, 2),
        "rate_share": round(operations_per_s / rate, 4),
        "useful_tokens_per_s": round(ours.tokens_per_s, 1),
        "peer_useful_tokens_per_s": round(peer.tokens_per_s, 1),
        "matrix_tflops": round(rate / 1e12, 1),
        "useful_tflops": round(operations_per_s / 1e12, 1),
        "attention_tflops": attention_tflops,
        "logprob_difference": round(difference, 6),
        "peak_gb": round(ours.peak_bytes / 1e9, 1),
        "peer_peak_gb": round(peer.peak_bytes / 1e9, 1),
        "seconds": [round(s, 2) for s in ours.seconds],
        "peer_seconds": [round(s, 2) for s in peer.seconds],
        "options": {key: str(value) for key, value in vars(options).items()},
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if setup.device.type == "cuda" else "cpu",
    }
    print(json.dumps(result), flush=True)


def learner_config(options: argparse.Namespace, setup: BenchmarkSetup) -> LearnerConfig:
    """Return the configuration of a learner on one GPU."""
    return LearnerConfig.model_validate(
        {
            "zero_stage": 1,
            "dtype": str(setup.dtype).removeprefix("torch."),
            "freeze_vision": True,
            "offload_optimizer": options.offload,
            "activation_checkpointing": options.activation_checkpointing,
            "micro_batch_tokens": options.tokens,
        }
    )


if __name__ == "__main__":
    main()
