"""Training loop of pretraining: takes optimizer steps on drawn screens, follows the curriculum, and can be resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deskrl.learner.pretraining import pretrain_losses
from deskrl.learner.pretraining.answer_sequences import STEP, SequenceBuilder
from deskrl.learner.pretraining.batched_forward import BatchedForward
from deskrl.learner.pretraining.batches import Batch, BatchSource
from deskrl.learner.pretraining.glyph_atlas import GlyphAtlas, build_atlas
from deskrl.learner.pretraining.layouts import Random
from deskrl.learner.pretraining.policy_folder import build_character_tokenizer, policy_config, policy_shape
from deskrl.learner.pretraining.pretrain_config import PretrainConfig
from deskrl.learner.pretraining.pretrain_evaluation import Evaluator
from deskrl.learner.pretraining.screen_curriculum import FONT_SIZES, LEVELS, Level, learning_rate_scale, next_level

_SMOOTHING = 0.98
"""Share of the running accuracy that each step keeps."""
_MAX_NORM = 1.0
_BETAS = (0.9, 0.98)
_DRAWN_BATCHES = 4
"""Batches that are drawn together: drawing takes as many kernels for several batches as for one."""
_MEASURE_EVERY = 20
"""Optimizer steps between looks at time and accuracy, which wait for the device."""
_POINT_SCREENS = 384
"""Held-out screens of each point of the curves."""
_EVAL_SEED_OFFSET = 1_000_003
_COUNTERS = ("step", "screens", "level", "elapsed_s", "level_started_s", "accuracy")


class Trainer:
    """Trains a policy.

    Args:
        config: configuration of the training.
    """

    def __init__(self, config: PretrainConfig) -> None:
        from transformers import Qwen2_5_VLForConditionalGeneration

        torch.manual_seed(config.seed)
        device = torch.device(config.device)
        is_cuda = device.type == "cuda"
        self._config = config
        self.shape = policy_shape(config.text_width, config.text_layers, config.vision_width, config.vision_layers)
        self.tokenizer = build_character_tokenizer()
        self.model: Any = Qwen2_5_VLForConditionalGeneration(policy_config(self.shape, self.tokenizer)).float()
        pretrain_losses.initialise_(self.model, config.text_layers)
        self.model.to(device)
        self.heads = pretrain_losses.DenseHeads(config.vision_width, config.text_width).to(device)
        self.forward = self._make_forward(is_compiled=is_cuda)
        compiled: Callable[[Any], Any] = partial(torch.compile, dynamic=False) if is_cuda else lambda function: function
        self._reading_loss = compiled(pretrain_losses.reading_loss)
        self._finding_loss = compiled(pretrain_losses.finding_loss)
        self._builder = SequenceBuilder(self.tokenizer, device)
        atlas = build_atlas(config.fonts, FONT_SIZES, device)
        self._generator = torch.Generator(device).manual_seed(config.seed)
        self.source = BatchSource(self._builder, atlas, Random(self._generator))
        self.evaluator = self._make_evaluator(atlas)
        self._optimizer = self._make_optimizer(is_cuda)
        self.step = self.screens = self.level = 0
        self.elapsed_s = self.level_started_s = 0.0
        self.accuracy = torch.zeros((), device=device)
        self._losses: dict[str, Tensor] = {}
        self._drawn: list[Batch] = []

    def train(self, report: Callable[[Mapping[str, Any]], None]) -> None:
        """Train until the time is over.

        Args:
            report: called with each point of the curves; the time that it takes does not count.
        """
        last = reported = time.monotonic()
        first_screen = self.screens
        while self.elapsed_s < self._config.duration_s:
            self.take_step(LEVELS[self.level])
            if self.step % _MEASURE_EVERY:
                continue
            accuracy = float(self.accuracy)
            now = time.monotonic()
            self.elapsed_s += now - last
            last = now
            if now - reported > self._config.report_every_s or self.elapsed_s >= self._config.duration_s:
                report(self._point((self.screens - first_screen) / (now - reported)))
                last = reported = time.monotonic()
                first_screen = self.screens
            self._follow_curriculum(accuracy)

    def save(self, path: Path) -> None:
        """Write a checkpoint from which training continues; a crash leaves the old one or the new one."""
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "counters": {name: getattr(self, name) for name in _COUNTERS},
        }
        partial_path = path.with_suffix(".partial")
        torch.save(state, partial_path)
        partial_path.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same configuration."""
        state = torch.load(path, map_location=self.accuracy.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"].cpu())
        for name in _COUNTERS:
            setattr(self, name, state["counters"][name])

    def _parameters(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.heads.parameters()]

    def _make_forward(self, *, is_compiled: bool) -> BatchedForward:
        dtype = torch.bfloat16 if self._config.device == "cuda" else torch.float32
        return BatchedForward(self.model, dtype, _dense_depth(self._config.text_layers), is_compiled)

    def _make_evaluator(self, atlas: GlyphAtlas) -> Evaluator:
        """Return an evaluator with random numbers of its own.

        Its forward pass is not compiled: that would be repeated for its batch size and without gradients.
        """
        generator = torch.Generator(self._config.device).manual_seed(self._config.seed + _EVAL_SEED_OFFSET)
        source = BatchSource(self._builder, atlas, Random(generator))
        return Evaluator(self._make_forward(is_compiled=False), self.heads, self._builder, source)

    def _make_optimizer(self, is_cuda: bool) -> torch.optim.AdamW:
        matrices = [parameter for parameter in self._parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self._parameters() if parameter.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self._config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self._config.learning_rate, betas=_BETAS, fused=is_cuda)

    def _follow_curriculum(self, accuracy: float) -> None:
        share = (self.elapsed_s - self.level_started_s) / self._config.duration_s
        following = next_level(self.level, accuracy, share)
        if following != self.level:
            self.level, self.level_started_s = following, self.elapsed_s
            self.accuracy.zero_()
            self._drawn.clear()

    def _point(self, screens_per_s: float) -> dict[str, Any]:
        level = LEVELS[self.level]
        point = {
            "elapsed_s": round(self.elapsed_s, 1),
            "step": self.step,
            "screens": self.screens,
            "screens_per_s": round(screens_per_s),
            "level": level.name,
            "accuracy": round(float(self.accuracy), 4),
            **{name: round(float(value), 4) for name, value in self._losses.items()},
        }
        if not level.is_reading:
            result = self.evaluator.evaluate(level.style, _POINT_SCREENS, held_out=True)
            point |= {f"held_out_{name}": value for name, value in result.as_json().items()}
        return point

    def take_step(self, level: Level) -> None:
        """Take an optimizer step on a batch of a level."""
        progress = self.elapsed_s / self._config.duration_s
        scale = learning_rate_scale(self.step, progress, self._config.warmup_steps, self._config.decay_share)
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.learning_rate * scale
        size = max(1, round(level.batch_scale * self._config.batch_size))
        if not self._drawn:
            self._drawn = self.source.draw(level.style, size * _DRAWN_BATCHES, held_out=False).split(size)
        batch = self._drawn.pop()
        loss, accuracy = self._reading_step(batch) if level.is_reading else self._finding_step(batch)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters(), _MAX_NORM)
        self._optimizer.step()
        self.accuracy.mul_(_SMOOTHING).add_((1 - _SMOOTHING) * accuracy)
        self.step += 1
        self.screens += size

    def _reading_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of reading, and the share of characters that are read."""
        head = self.heads.characters
        patches = self.forward.see(batch.pictures)
        loss, accuracy = self._reading_loss(patches, head.weight, head.bias, batch.characters)
        self._losses = {"reading_loss": loss.detach()}
        return loss, accuracy.detach()

    def _finding_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of answers and dense targets, and the share of the answers that hit the named element."""
        hidden = self.forward(batch.pictures, batch.sequences)
        answers = batch.answers
        head = self.heads.characters
        reading, read = self._reading_loss(hidden.patches, head.weight, head.bias, batch.characters)
        head = self.heads.places
        finding = self._finding_loss(hidden.cells, head.weight, head.bias, batch.cells, answers.weight)
        logits = self.forward.logits(hidden.answer)
        places = (self._builder.x_place, self._builder.x_place + 2)
        x_ids, y_ids = (self._builder.of_number[: STEP * part.shape[1] : STEP] for part in (answers.x, answers.y))
        tokens = batch.sequences.after[:, -batch.sequences.num_answer :]
        answer = pretrain_losses.answer_loss(logits, tokens, places, (x_ids, y_ids), answers)
        x = logits[:, places[0]].detach()[:, x_ids].argmax(-1) * STEP
        y = logits[:, places[1]].detach()[:, y_ids].argmax(-1) * STEP
        hit = (pretrain_losses.hits(x, y, answers.boxes) * answers.weight).sum() / answers.weight.sum().clamp(min=1)
        self._losses = {
            "answer_loss": answer.detach(),
            "finding_loss": finding.detach(),
            "reading_loss": reading.detach(),
            "read": read.detach(),
        }
        return answer + finding + reading, hit


def _dense_depth(num_layers: int) -> int:
    """Return the number of language layers after which image tokens are marked: the rest read the answer off them."""
    return max(1, 2 * num_layers // 3)
