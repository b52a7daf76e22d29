"""The learner's half of a weight update without learning: a model that changes a little from update to update."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deskrl.core.config import RunConfig
from deskrl.core.rendering import image_sizing_of, processor_hash, suppressed_ids, vocab_size_of
from deskrl.learner.policy.checkpoint_names import checkpoint_tensors
from deskrl.learner.policy.model import Policy, load_policy, load_processor
from deskrl.learner.weights.announcements import Announcement, describe
from deskrl.learner.weights.canary import CanaryProbe, make_canary
from deskrl.proto.v1 import common_pb2


class Held:
    """The model, as the learner's engine would hold it, in a world of one rank."""

    rank = 0

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def checkpoint_parameters(self) -> Mapping[str, Tensor]:
        return checkpoint_tensors(self.policy.model)

    def gathered(self, parameters: list[Tensor]) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu() for name, tensor in self.checkpoint_parameters().items()}

    def from_rank_0(self, value: str) -> str:
        return value


@dataclass
class Changing:
    """A model with its canary; each announcement is of other weights than the last."""

    held: Held
    probe: CanaryProbe
    processor: str
    num_updates: int = 0

    @torch.no_grad()
    def announce(self) -> Announcement:
        """The next weights: those of the last norm are moved, enough to change every logprob."""
        self.num_updates += 1
        self.held.policy.model.model.language_model.norm.weight.mul_(1.0 + 0.02 * (-1) ** self.num_updates)
        device = next(self.held.policy.parameters()).device
        scores = self.held.policy(self.probe.batch.to(device), 1.0, False)
        return Announcement(
            version=common_pb2.PolicyVersion(lineage="test", step=self.num_updates),
            specs=describe(self.held.checkpoint_parameters()),
            canary=self.probe.canary,
            canary_logprobs=tuple(scores.logprobs_N.float().tolist()),
            processor_hash=self.processor,
        )


def load_changing(config: RunConfig, device: torch.device, image_size: tuple[int, int]) -> Changing:
    """The model of a run on a device, in the replica's numeric type."""
    folder = config.model_folder
    processor = load_processor(folder)
    suppressed = suppressed_ids(processor.tokenizer, vocab_size_of(folder))
    policy = load_policy(folder, suppressed, freeze_vision=True).to(getattr(torch, config.inference.dtype)).eval()
    probe = make_canary(policy, processor, image_sizing_of(folder), *image_size)
    return Changing(Held(policy.to(device)), probe, processor_hash(folder, processor.tokenizer))
