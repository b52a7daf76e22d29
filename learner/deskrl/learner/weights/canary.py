"""Canary: a fixed prompt and continuation whose logprobs verify that a replica serves the published weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deskrl.core.prompt_rendering import ImageSizing, encode_text, expand_images, image_token_id, render_prompt
from deskrl.learner.batches.collator import MicroBatch
from deskrl.learner.policy.deepspeed_engine import DeepSpeedEngine
from deskrl.learner.policy.policy_model import Policy
from deskrl.learner.policy.probe_prompt import make_probe_prompt
from deskrl.proto.v1 import weights_pb2

_CONTINUATION = "Thought: a picture of two gradients.\nAction: click(start_box='(120,84)')"
_MAX_TOKENS = 24


@dataclass(frozen=True)
class CanaryProbe:
    """Canary together with the micro-batch that scores it in the learner."""

    canary: weights_pb2.Canary
    batch: MicroBatch

    def score(self, engine: DeepSpeedEngine) -> tuple[float, ...]:
        """Return logprobs of the continuation under the current weights, at temperature 1 without suppressed tokens."""
        return tuple(engine.score(self.batch, temperature=1.0, suppress=False).logprobs_N.tolist())


def make_canary(policy: Policy, processor: Any, sizing: ImageSizing, width: int, height: int) -> CanaryProbe:
    """Return the canary of a model for screenshots of one size in pixels."""
    probe = make_probe_prompt(width, height)
    tokenizer = processor.tokenizer
    prompt = render_prompt([probe.message], tokenizer)
    prompt_ids = expand_images(prompt.ids, image_token_id(tokenizer), [sizing.num_tokens(width, height)])
    continuation_ids = encode_text(_CONTINUATION, tokenizer)[:_MAX_TOKENS]
    row = probe.row(prompt_ids, continuation_ids, [0.0] * len(continuation_ids))
    return CanaryProbe(
        canary=weights_pb2.Canary(messages=[probe.message], images=[probe.image], continuation_ids=continuation_ids),
        batch=probe.collator(policy, processor).collate([row]),
    )
