"""Proves a checkpoint: a fresh engine that serves it and transformers give the same logprobs.

Samples actions about a picture through `Act` and scores the very ids that came back. Knows the checkpoint as a folder;
needs no learner state, no DeepSpeed and no run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deskrl.core import rpc
from deskrl.core.config import RunConfig
from deskrl.core.rendering import image_sizing_of, suppressed_ids, vocab_size_of
from deskrl.core.runfolder import write_json
from deskrl.learner.batches.packing import Row
from deskrl.learner.policy.model import load_policy, load_processor, make_collator
from deskrl.learner.weights.canary import make_canary
from deskrl.proto.v1 import inference_pb2, inference_pb2_grpc, weights_pb2

NUM_ACTIONS = 8
TEMPERATURE = 1.0
_ACT_TIMEOUT_S = 60.0


def main(config: RunConfig, outcome: Path) -> int:
    """Compare the checkpoint at `model.path` with the engine at `inference.address`; write what came out.

    Args:
        config: of the engine.
        outcome: file for {"path", "num_tokens", "mean_difference", "max_difference"}, of logprobs.
    """
    folder = config.model_folder
    processor = load_processor(folder)
    policy = load_policy(folder, suppressed_ids(processor.tokenizer, vocab_size_of(folder)), freeze_vision=True)
    canary = make_canary(policy, processor, image_sizing_of(folder), *config.image_size).canary
    collator = make_collator(policy, processor, lambda hashes: {canary.images[0].hash: canary.images[0].data})
    rows = [_row(action, canary) for action in _sample(config, canary)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy.to(device)
    with torch.no_grad():
        scores = policy(batch := collator.collate(rows).to(device), TEMPERATURE)
    difference_N = (scores.logprobs_N - batch.behaviour_logprobs_N).abs()
    write_json(outcome, {"path": str(folder), "num_tokens": len(difference_N), **_summary(difference_N)})
    return 0


def _summary(difference_N: Any) -> dict[str, float]:
    return {"mean_difference": float(difference_N.mean()), "max_difference": float(difference_N.max())}


def _sample(config: RunConfig, canary: weights_pb2.Canary) -> list[inference_pb2.SampledAction]:
    """Actions that the engine samples about the canary's picture."""
    actions = []
    with rpc.connect_sync(config.inference.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for seed in range(NUM_ACTIONS):
            request = inference_pb2.ActRequest(
                peer=rpc.peer("learner", "proof"),
                request_id=f"proof-{seed}",
                messages=canary.messages,
                images=canary.images,
                temperature=TEMPERATURE,
                max_tokens=config.inference.max_action_tokens,
                seed=seed,
            )
            actions.append(stub.Act(request, timeout=_ACT_TIMEOUT_S).action)
    return actions


def _row(action: inference_pb2.SampledAction, canary: weights_pb2.Canary) -> Row:
    start, num_tokens = len(action.prompt_ids), len(action.action_ids)
    return Row(
        trajectory=0,
        token_ids=(*action.prompt_ids, *action.action_ids),
        images=(canary.images[0].hash,),
        targets=tuple(range(start, start + num_tokens)),
        behaviour_logprobs=tuple(action.logprobs),
        lags=(0,) * num_tokens,
    )
