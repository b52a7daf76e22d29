"""The learner's side of weight updates without training: a model whose weights change slightly with every update."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from deskrl.core.config import RunConfig
from deskrl.core.prompt_rendering import processor_hash, read_image_sizing, read_vocab_size, suppressed_ids
from deskrl.learner.policy.policy_model import Policy, load_policy, load_processor
from deskrl.learner.policy.state_dict_names import checkpoint_tensors
from deskrl.learner.weights.canary import CanaryProbe, make_canary
from deskrl.learner.weights.manifest import WeightManifest, tensor_specs
from deskrl.proto.v1 import common_pb2


class SingleRankSource:
    """Weight source of a single rank, in place of the learner's engine."""

    rank = 0

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def checkpoint_parameters(self) -> Mapping[str, Tensor]:
        return checkpoint_tensors(self.policy.model)

    def gathered(self, parameters: list[Tensor]) -> AbstractContextManager[list[Tensor]]:
        return contextlib.nullcontext(parameters)

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu() for name, tensor in self.checkpoint_parameters().items()}

    def broadcast_from_rank_0(self, value: str) -> str:
        return value


@dataclass
class ChangingModel:
    """Model with its canary; each manifest describes different weights."""

    source: SingleRankSource
    probe: CanaryProbe
    processor: str
    num_updates: int = 0

    @torch.no_grad()
    def next_manifest(self) -> WeightManifest:
        """Change the weights of the last norm, which changes every logprob, and return their manifest."""
        self.num_updates += 1
        self.source.policy.model.model.language_model.norm.weight.mul_(1.0 + 0.02 * (-1) ** self.num_updates)
        device = next(self.source.policy.parameters()).device
        scores = self.source.policy(self.probe.batch.to(device), 1.0, False)
        return WeightManifest(
            version=common_pb2.PolicyVersion(lineage="test", step=self.num_updates),
            specs=tensor_specs(self.source.checkpoint_parameters()),
            canary=self.probe.canary,
            canary_logprobs=tuple(scores.logprobs_N.float().tolist()),
            processor_hash=self.processor,
        )


def load_changing_model(config: RunConfig, device: torch.device, image_size: tuple[int, int]) -> ChangingModel:
    """Load the model of a run on a device, in the numeric type of the replica."""
    folder = config.model_folder
    processor = load_processor(folder)
    suppressed = suppressed_ids(processor.tokenizer, read_vocab_size(folder))
    policy = load_policy(folder, suppressed, freeze_vision=True).to(getattr(torch, config.inference.dtype)).eval()
    probe = make_canary(policy, processor, read_image_sizing(folder), *image_size)
    return ChangingModel(SingleRankSource(policy.to(device)), probe, processor_hash(folder, processor.tokenizer))
