"""Probe prompt: a fixed user message with a synthetic screenshot, with which learner and engine are compared."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from deskrl.core import ids
from deskrl.learner.batches.collator import Collator
from deskrl.learner.batches.packing import Row
from deskrl.learner.policy.policy_model import Policy, make_collator
from deskrl.proto.v1 import common_pb2, inference_pb2

_TEXT = "What is on the screen?"


@dataclass(frozen=True)
class ProbePrompt:
    """Prompt of one message with one screenshot."""

    message: inference_pb2.ChatMessage
    image: common_pb2.Image

    def row(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], behaviour_logprobs: Sequence[float]
    ) -> Row:
        """Return the row that scores a continuation of this prompt."""
        return Row(
            trajectory=0,
            token_ids=(*prompt_ids, *continuation_ids),
            images=(self.image.hash,),
            targets=tuple(range(len(prompt_ids), len(prompt_ids) + len(continuation_ids))),
            behaviour_logprobs=tuple(behaviour_logprobs),
            staleness=(0,) * len(continuation_ids),
        )

    def collator(self, policy: Policy, processor: Any) -> Collator:
        """Return a collator for rows of this prompt."""
        return make_collator(policy, processor, lambda hashes: {self.image.hash: self.image.data})


def make_probe_prompt(width: int, height: int) -> ProbePrompt:
    """Return the prompt for screenshots of one size in pixels."""
    png = _synthetic_png(width, height)
    image_hash = ids.image_hash(png)
    message = inference_pb2.ChatMessage(
        role=inference_pb2.MESSAGE_ROLE_USER,
        contents=[inference_pb2.Content(image_hash=image_hash), inference_pb2.Content(text=_TEXT)],
    )
    return ProbePrompt(message, common_pb2.Image(hash=image_hash, data=png))


def _synthetic_png(width: int, height: int) -> bytes:
    """Return a PNG image in which every patch differs."""
    horizontal = Image.linear_gradient("L").rotate(90).resize((width, height))
    vertical = Image.linear_gradient("L").resize((width, height))
    fractal = Image.effect_mandelbrot((width, height), (-2.0, -1.2, 1.0, 1.2), 64)
    buffer = io.BytesIO()
    Image.merge("RGB", (horizontal, vertical, fractal.convert("L"))).save(buffer, "PNG")
    return buffer.getvalue()
