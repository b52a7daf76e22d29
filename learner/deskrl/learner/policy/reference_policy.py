"""Reference policy of the KL penalty: scores action tokens under the model that training started from.

The reference is never trained. It is the model of the run's model folder: a frozen copy of it, or with LoRA the model
that the adapter is added to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from deskrl.core.config import LearnerConfig, RunConfig
from deskrl.core.errors import UserError
from deskrl.learner.batches.collator import MicroBatch
from deskrl.learner.checkpoint.reference_record import KEY, record_reference
from deskrl.learner.policy.deepspeed_engine import DeepSpeedEngine
from deskrl.learner.policy.policy_model import Policy, load_policy


class ReferencePolicy(Protocol):
    """Policy that the KL divergence is measured from."""

    def logprobs(self, micro_batches: Iterable[MicroBatch], temperature: float) -> list[Tensor]:
        """Return the logprobs of the action tokens of each micro-batch, without gradient, on the learner's device.

        A collective call: each rank passes equally many micro-batches.

        Args:
            micro_batches: micro-batches of this rank, on any device.
            temperature: temperature of the sampling distribution; divides the logits.
        """
        ...


class BaseModelReference:
    """Reference policy of a LoRA run: the trained model without its adapter, which needs no memory of its own.

    Args:
        engine: engine of this rank, whose policy has an adapter.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine

    def logprobs(self, micro_batches: Iterable[MicroBatch], temperature: float) -> list[Tensor]:
        """Implement `ReferencePolicy`."""
        assert self._engine.policy.adapter is not None
        with self._engine.policy.adapter.disabled():
            return [self._engine.score(micro, temperature).logprobs_N for micro in micro_batches]


class FrozenReference:
    """Reference policy with weights of its own.

    Each rank holds a copy of the weights in the numeric type of the learner, or its shard of them under ZeRO 3.

    Args:
        policy: the reference policy, on the CPU; its weights are not copied.
        config: learner configuration: ZeRO stage, numeric type, and offload of the reference.
        device: device of the learner.
    """

    def __init__(self, policy: Policy, config: LearnerConfig, device: torch.device) -> None:
        self._device = device
        self._policy = policy.eval().requires_grad_(False)
        self._forward: Callable[..., Any] = policy
        self._offloaded: list[tuple[Tensor, Tensor]] = []
        """Parameters that are on the device only while tokens are scored, with their weights in host memory."""
        if config.zero_stage == 3:
            self._forward = _sharded(policy, config)
        elif config.offload_reference and device.type != "cpu":
            # Not pinned: the allocator of pinned memory rounds the size of each tensor up to a power of two.
            self._offloaded = [(parameter, parameter.data) for parameter in policy.parameters()]
            self._release()
        policy.to(device)

    def logprobs(self, micro_batches: Iterable[MicroBatch], temperature: float) -> list[Tensor]:
        """Implement `ReferencePolicy`."""
        with torch.no_grad(), self._on_device():
            return [self._forward(micro.to(self._device), temperature).logprobs_N for micro in micro_batches]

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Hold offloaded weights on the device within the context."""
        for parameter, host in self._offloaded:
            parameter.data = host.to(self._device)
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        for parameter, _ in self._offloaded:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self._device)


def build_reference(
    config: RunConfig, engine: DeepSpeedEngine, suppressed_ids: tuple[int, ...]
) -> ReferencePolicy | None:
    """Return the reference policy of a run; None without a KL penalty. A collective call.

    Args:
        config: run configuration.
        engine: engine of this rank, whose policy has the same model folder.
        suppressed_ids: ids of tokens that are never sampled.

    Raises:
        UserError: the model cannot be loaded, or is not the one that the run started with.
    """
    if not config.learner.grpo.kl_coefficient:
        return None
    if engine.rank == 0:
        record_reference(config)
    if engine.policy.adapter is not None:
        return BaseModelReference(engine)
    try:
        policy = load_policy(
            config.model_folder,
            suppressed_ids,
            freeze_vision=True,
            dtype=getattr(torch, config.learner.dtype),
            architecture=config.model.architecture,
        )
    except UserError as error:
        raise UserError(f"{KEY}: the reference policy cannot be loaded: {error.message}", error.hint) from error
    # Features are cached only if the vision tower is frozen; they are those of the reference too.
    policy.features = engine.policy.features
    return FrozenReference(policy, config.learner, engine.device)


def _sharded(policy: Policy, config: LearnerConfig) -> Callable[..., Any]:
    """Return the forward pass of a policy whose parameters are sharded over the ranks (ZeRO 3); a collective call."""
    import deepspeed

    zero: dict[str, Any] = {"stage": 3}
    if config.offload_reference:
        zero["offload_param"] = {"device": "cpu"}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "fp16": {"enabled": config.dtype == "float16"},
        "steps_per_print": None,
    }
    engine, *_ = deepspeed.initialize(model=policy, config=settings)
    forward: Callable[..., Any] = engine
    return forward
