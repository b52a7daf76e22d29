"""The canary: a fixed conversation with a screenshot, whose logprobs tell which weights answer.

Knows how to make one for a model and how the learner scores it; knows nothing of replicas.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from PIL import Image

from deskrl.core import ids
from deskrl.core.rendering import ImageSizing, encode_text, expand_images, image_token_id, render
from deskrl.learner.batches.batch import MicroBatch
from deskrl.learner.batches.packing import Row
from deskrl.learner.policy.engine import Engine
from deskrl.learner.policy.model import Policy, make_collator
from deskrl.proto.v1 import common_pb2, inference_pb2, weights_pb2

_TEXT = "What is on the screen?"
_CONTINUATION = "Thought: a picture of two gradients.\nAction: click(start_box='(120,84)')"
_MAX_TOKENS = 24


@dataclass(frozen=True)
class CanaryProbe:
    """A canary with the micro-batch that scores it here."""

    canary: weights_pb2.Canary
    batch: MicroBatch

    def score(self, engine: Engine) -> tuple[float, ...]:
        """Logprobs of the continuation under the present weights, temperature 1, nothing suppressed."""
        return tuple(engine.score(self.batch, temperature=1.0, suppress=False).logprobs_N.tolist())


def make_canary(policy: Policy, processor: Any, sizing: ImageSizing, width: int, height: int) -> CanaryProbe:
    """The canary of a model for screenshots of one size."""
    png = _picture(width, height)
    name = ids.image_hash(png)
    message = inference_pb2.ChatMessage(
        role=inference_pb2.MESSAGE_ROLE_USER,
        contents=[inference_pb2.Content(image_hash=name), inference_pb2.Content(text=_TEXT)],
    )
    tokenizer = processor.tokenizer
    prompt = render([message], tokenizer)
    prompt_ids = expand_images(prompt.ids, image_token_id(tokenizer), [sizing.num_tokens(width, height)])
    continuation = encode_text(_CONTINUATION, tokenizer)[:_MAX_TOKENS]
    row = Row(
        trajectory=0,
        token_ids=(*prompt_ids, *continuation),
        images=(name,),
        targets=tuple(range(len(prompt_ids), len(prompt_ids) + len(continuation))),
        behaviour_logprobs=(0.0,) * len(continuation),
        lags=(0,) * len(continuation),
    )
    return CanaryProbe(
        canary=weights_pb2.Canary(
            messages=[message], images=[common_pb2.Image(hash=name, data=png)], continuation_ids=continuation
        ),
        batch=make_collator(policy, processor, lambda hashes: {name: png}).collate([row]),
    )


def _picture(width: int, height: int) -> bytes:
    """A picture in which every patch differs."""
    across = Image.linear_gradient("L").rotate(90).resize((width, height))
    down = Image.linear_gradient("L").resize((width, height))
    waves = Image.effect_mandelbrot((width, height), (-2.0, -1.2, 1.0, 1.2), 64)
    buffer = io.BytesIO()
    Image.merge("RGB", (across, down, waves.convert("L"))).save(buffer, "PNG")
    return buffer.getvalue()
