"""Learning from long screenshot histories: deskrl's optimizer step against padded rows, one row per step.

Made-up episodes (15 steps, one 1280 x 720 screenshot each, context `episode`) with rewards, and a model of
UI-TARS-1.5-7B's shape with made-up weights, drawn on the device. Speed depends on neither.

deskrl: `grpo.learn` as the learner calls it, from encoded screenshots to the changed weights, under DeepSpeed (ZeRO 1,
frozen vision tower, AdamW in float32). Every step meets new screenshots, so each goes through the vision tower.
Peer: the same model, kernels, loss and kept activations; every step of an episode is a row of its own with its
screenshots, rows of like length go together, padded to the longest, and logits are made at every position. Forward and
backward only: what it would need for an optimizer step, and for decoding screenshots, is left out, in its favour.
Both sides learn from the same useful tokens: those of the episodes, each counted once. The device cannot hold both
sides' memory, so they run one after another, the peer first.

Operations are those of matrix products that the result depends on, two for each multiply-add; what is computed anew
in the backward pass is not counted. With T tokens in rows of lengths L, N action tokens, W weights in the linear layers
of the language model, H its heads times their dimension, layers K, hidden size D, vocabulary V:

    language   3 x (2 T W + K x 2 H x sum of L^2)       forward once, backward twice; causal attention counts half
    head       3 x 2 N D V
    vision     2 P W_v + sum over its layers of 4 D_v x sum of S^2, for P patches in windows of S patches; forward only

`rate_share` is these operations per second over the rate of one large bfloat16 product of matrices in the same run.
Prints progress, then one JSON line; `ratio` is useful tokens per second over the peer's, each side the median of its
turns. `logprob_difference` compares what both sides make of the same tokens under the same weights.

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
from pathlib import Path
from typing import Any

# Rows differ in length: without this, the allocator's blocks do not fit one another.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kit"))

import torch
from learner_kit import SMALL_SHAPE
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from deskrl.core.byte_cache import ByteCache
from deskrl.core.config import GrpoConfig, LearnerConfig
from deskrl.core.ids import image_hash
from deskrl.core.rendering import image_sizing_of, suppressed_ids
from deskrl.core.trajectory import Span, Step
from deskrl.learner import grpo
from deskrl.learner.batches.batch import MicroBatch
from deskrl.learner.batches.feed import Feed
from deskrl.learner.batches.packing import Row, pack
from deskrl.learner.policy import activations, attention
from deskrl.learner.policy.engine import Engine
from deskrl.learner.policy.model import Policy, load_processor, make_collator
from deskrl.learner.policy.shaped_model import UI_TARS_7B, write_all_but_weights
from deskrl.learner.select import Selection
from deskrl.learner.trajectories import Trajectory

SIZE = (1280, 720)
OPENING_TOKENS, ACTION_TOKENS, CLOSING_TOKENS = 420, (30, 90), 5
TINY = replace(SMALL_SHAPE, max_pixels=100352)


@dataclass
class Case:
    """Episodes that no other turn has, with their screenshots."""

    trajectories: list[Trajectory]
    shots: dict[str, bytes]

    def rows(self, share: bool = True) -> list[Row]:
        """Their rows, shared by steps or one for each."""
        return [
            row
            for index, trajectory in enumerate(self.trajectories)
            for row in pack(index, trajectory.steps, [[0] * len(s.action_ids) for s in trajectory.steps], share)
        ]


@dataclass(frozen=True)
class Side:
    """What one side's turns came to."""

    seconds: list[float]
    useful_tokens: list[int]
    peak_bytes: int

    @property
    def tokens_per_s(self) -> float:
        """Median over turns."""
        return statistics.median(n / s for n, s in zip(self.useful_tokens, self.seconds, strict=True))


def say(text: str) -> None:
    """Progress, beside the one line of results."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


class World:
    """The model, the device and everything made up."""

    def __init__(self, options: argparse.Namespace, folder: Path, rank: int = 0, num_ranks: int = 1) -> None:
        from transformers import Qwen2_5_VLForConditionalGeneration

        self.options = options
        self.device = torch.device(options.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        shape = UI_TARS_7B if options.model == "7b" else TINY
        config = write_all_but_weights(folder, shape, max(SIZE), ["press the button and type a word"] * 8)
        self.processor = load_processor(folder)
        self.tokens_per_image = image_sizing_of(folder).num_tokens(*SIZE)
        suppressed = suppressed_ids(self.processor.tokenizer, shape.text["vocab_size"])
        torch.manual_seed(0)
        torch.set_default_dtype(self.dtype)
        with self.device:
            model = Qwen2_5_VLForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
        for parameter in model.parameters():  # not the buffers: positions need float32
            parameter.data = parameter.data.to(self.dtype)
        model.requires_grad_(True).model.visual.requires_grad_(False)
        self.policy = Policy(model, suppressed, ByteCache(2 * 1024**3)).to(self.device)
        activations.keep(model.model.language_model, options.activations)
        self.shots: dict[str, bytes] = {}
        self.feed = Feed(
            make_collator(self.policy, self.processor, self._fetch), rank, num_ranks, options.tokens, lambda: None
        )
        with self.without_features():
            self.pixel_collator = make_collator(self.policy, self.processor, self._fetch)
        self._generator = random.Random(0)

    def case(self, num_episodes: int) -> Case:
        """New episodes."""
        shots: dict[str, bytes] = {}
        trajectories = [self._episode(shots, reward=float(index % 2)) for index in range(num_episodes)]
        self.shots = shots
        return Case(trajectories, shots)

    @contextmanager
    def without_features(self) -> Iterator[None]:
        """What a vision tower has made is not kept meanwhile, nor used."""
        features, self.policy.features = self.policy.features, None
        yield
        self.policy.features = features

    def synchronise(self) -> float:
        """The time when everything that was asked for is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_bytes(self) -> int:
        """Most memory that was in use on the device since the last call."""
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
            spans = (Span("made-up", 0, 0, len(action)),)
            logprobs = (-8.0,) * len(action)
            steps.append(Step(index, images[-1], tuple(images), "", tuple(prompt), tuple(action), logprobs, spans))
            prompt += action
        return Trajectory(images[0], "made-up", reward, tuple(steps))

    def _words(self, num: int) -> list[int]:
        """Tokens that are not special: those come first in the vocabulary."""
        return [self._generator.randrange(300, 1000) for _ in range(num)]

    def _screenshot(self) -> bytes:
        """Windows on a plain desktop; no two are alike."""
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
    """Rows of like length, as many as fit once they are padded to the longest; a longer row goes alone."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.token_ids)):
        if batch and (len(batch) + 1) * len(batch[0].token_ids) > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def pad(world: World, rows: Sequence[Row]) -> MicroBatch:
    """A micro-batch of rows that are all as long as the longest."""
    length = max(len(row.token_ids) for row in rows)
    padded = [replace(row, token_ids=(*row.token_ids, *[0] * (length - len(row.token_ids)))) for row in rows]
    return world.pixel_collator.collate(padded)


def padded_logprobs(world: World, micro: MicroBatch) -> Tensor:
    """Logprobs of the action tokens, by way of logits at every position; every screenshot goes through the tower."""
    micro = micro.to(world.device)
    policy, body = world.policy, world.policy.model.model
    hidden_LD = body.language_model(
        inputs_embeds=policy._embed(micro)[None],
        position_ids=micro.position_ids_3L[:, None],
        attention_mask={"full_attention": None},
        use_cache=False,
        **attention.lengths_of(micro.row_lengths, world.device).as_arguments(),
    ).last_hidden_state[0]
    logits_LV = policy.model.lm_head(hidden_LD).float().index_fill(1, policy.suppressed_ids, float("-inf"))
    return logits_LV.log_softmax(-1)[micro.position_N, micro.target_N]


def run_peer(world: World) -> Side:
    """Forward and backward over padded rows."""
    side = Side([], [], 0)
    for turn in range(world.options.turns):  # the comparison before has warmed up all that needs it
        case = world.case(world.options.peer_episodes)
        batches = [pad(world, rows) for rows in padded_batches(case.rows(share=False), world.options.tokens)]
        began = world.synchronise()
        with world.without_features():
            for micro in batches:
                (-padded_logprobs(world, micro).sum() / 1000.0).backward()
        side.seconds.append(world.synchronise() - began)
        side.useful_tokens.append(sum(len(row.token_ids) for row in case.rows()))
        say(f"peer, turn {turn}: {side.seconds[-1]:.1f} s")
        world.policy.zero_grad(set_to_none=True)
    return replace(side, peak_bytes=world.peak_bytes())


def compare(world: World) -> float:
    """Mean difference between both sides' logprobs of one episode's action tokens."""
    case = world.case(1)
    with torch.no_grad(), world.without_features():
        micro = world.pixel_collator.collate(case.rows())
        packed = world.policy(micro.to(world.device), 1.0).logprobs_N
        padded = torch.cat([padded_logprobs(world, pad(world, [row])) for row in case.rows(share=False)])
    return float((packed - padded).abs().mean())


# deskrl.


def run_deskrl(world: World, engine: Engine) -> tuple[Side, float]:
    """Optimizer steps; also operations per second, median."""
    side, rates = Side([], [], 0), []
    for turn in range(world.options.turns + 1):
        seconds, rows, report = optimizer_step(world, engine)
        if turn:
            side.seconds.append(seconds)
            side.useful_tokens.append(sum(len(row.token_ids) for row in rows))
            rates.append(operations(world, rows) / seconds)
        say(f"deskrl, turn {turn}: {seconds:.1f} s, loss {report.loss:.4f}, gradient norm {report.gradient_norm:.4f}")
        if not report.applied:
            raise SystemExit("the gradient is not finite")
    return replace(side, peak_bytes=world.peak_bytes()), statistics.median(rates)


def optimizer_step(world: World, engine: Engine) -> tuple[float, Sequence[Row], grpo.UpdateReport]:
    """One, as the learner takes it."""
    case = world.case(world.options.episodes)
    selection = Selection("made-up", "made-up", tuple(case.trajectories))
    began = world.synchronise()
    batch = grpo.prepare([selection], lambda span: 0, GrpoConfig())
    report = grpo.learn(engine, world.feed, batch, GrpoConfig(), num_updates=1)
    return world.synchronise() - began, batch.rows, report


def operations(world: World, rows: Sequence[Row]) -> float:
    """Useful operations of an optimizer step; the formula stands at the top of this file."""
    config, model = world.policy.model.config, world.policy.model.model
    text, vision = config.text_config, config.vision_config
    lengths = [len(row.token_ids) for row in rows]
    language = 2 * sum(lengths) * linear_weights(model.language_model)
    language += 2 * text.num_hidden_layers * text.hidden_size * sum(length**2 for length in lengths)
    head = 2 * sum(len(row.targets) for row in rows) * text.hidden_size * text.vocab_size
    merge = vision.spatial_merge_size
    num_patches = world.tokens_per_image * merge**2
    # The merger's layers see merged patches: a fraction of the positions.
    tower = 2 * num_patches * (linear_weights(model.visual) - (1 - 1 / merge**2) * linear_weights(model.visual.merger))
    tower += 2 * num_patches * model.visual.patch_embed.proj.weight.numel()
    window = (vision.window_size // vision.patch_size) ** 2  # patches; windows at the edges are smaller
    num_full = len(vision.fullatt_block_indexes)
    pairs = num_full * num_patches**2 + (vision.depth - num_full) * num_patches * window
    tower += 4 * vision.hidden_size * pairs
    num_images = sum(len(row.images) for row in rows)
    return 3.0 * (language + head) + num_images * tower


def linear_weights(module: torch.nn.Module) -> int:
    """Weights that every position is multiplied by."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, torch.nn.Linear))


# The machine.


def timed(world: World, work: Callable[[], object], num: int) -> float:
    """Seconds of one call, the fastest of three times `num`."""
    work()
    best = float("inf")
    for _ in range(3):
        began = world.synchronise()
        for _ in range(num):
            work()
        best = min(best, (world.synchronise() - began) / num)
    return best


def matrix_rate(world: World) -> float:
    """Operations per second of one large product of bfloat16 matrices."""
    side = 8192 if world.device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=world.device, dtype=torch.bfloat16) for _ in range(2))
    return float(2 * side**3 / timed(world, lambda: a @ b, 50))


def attention_rates(world: World) -> dict[str, float]:
    """Operations per second, forward and backward, of torch's attention kernels on a row of an episode."""
    if world.device.type != "cuda":
        return {}
    text, length = world.policy.model.config.text_config, 19_000
    heads, dim = text.num_attention_heads, text.hidden_size // text.num_attention_heads
    shape = (1, heads, length, dim)
    q, k, v = (torch.randn(shape, device=world.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    count = 7 * length**2 * heads * dim  # two products forward, five backward, half of each
    rates = {}
    for backend in (torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.CUDNN_ATTENTION):

        def work() -> None:
            scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

        began = world.synchronise()
        try:
            with torch.nn.attention.sdpa_kernel(backend):
                work()
                first_s = world.synchronise() - began
                rates[backend.name.lower()] = round(count / timed(world, work, 3) / 1e12, 1)
        except RuntimeError as error:  # torch has it, this machine has not
            say(f"{backend.name}: {error}")
            continue
        say(f"{backend.name}: {rates[backend.name.lower()]} Tflop/s, first call {first_s:.2f} s")
    return rates


def write_profile(world: World, engine: Engine, path: Path) -> None:
    """The operators that an optimizer step spends its time in."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        seconds, rows, _ = optimizer_step(world, engine)
    key = "self_cuda_time_total" if world.device.type == "cuda" else "self_cpu_time_total"
    table = profile.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=90)
    num_tokens = sum(len(row.token_ids) for row in rows)
    path.write_text(
        f"one optimizer step: {len(rows)} rows, {num_tokens} tokens, {seconds:.2f} s under the profiler\n{table}\n"
    )
    say(f"profile in {path}")


def main() -> None:
    """Measure both sides and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("7b", "tiny"), default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--episodes", type=int, default=4, help="in one optimizer step")
    parser.add_argument("--steps", type=int, default=15, help="of an episode")
    parser.add_argument("--peer_episodes", type=int, default=1, help="in one turn of the peer")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20480, help="of a micro-batch, on both sides")
    parser.add_argument("--activations", choices=("all", "attention", "layers"), default="attention")
    parser.add_argument("--offload", action="store_true", help="keep the optimizer's states in the host's memory")
    parser.add_argument("--profile", type=Path, help="write where the time of one optimizer step goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        world = World(options, Path(folder))
        say(f"model drawn after {time.perf_counter() - began:.0f} s, {world.peak_bytes() / 1e9:.1f} GB")
        rate = matrix_rate(world)
        say(f"matrix rate {rate / 1e12:.1f} Tflop/s")
        attention_tflops = attention_rates(world)
        difference = compare(world)
        say(f"mean difference of logprobs {difference:.5f}")
        peer = run_peer(world)
        engine = Engine(world.policy, learner_config(options, world))
        say(f"engine ready, {world.peak_bytes() / 1e9:.1f} GB")
        ours, operations_per_s = run_deskrl(world, engine)
        if options.profile:
            write_profile(world, engine, options.profile)
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
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
    }
    print(json.dumps(result), flush=True)


def learner_config(options: argparse.Namespace, world: World) -> LearnerConfig:
    """As a run on one GPU has it."""
    return LearnerConfig.model_validate(
        {
            "zero_stage": 1,
            "dtype": str(world.dtype).removeprefix("torch."),
            "freeze_vision": True,
            "offload_optimizer": options.offload,
            "activations": options.activations,
            "micro_batch_tokens": options.tokens,
        }
    )


if __name__ == "__main__":
    main()
