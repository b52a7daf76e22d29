"""Verifies a checkpoint: compares logprobs of an inference engine that serves it with those of transformers.

Actions are sampled through `Act` for the probe prompt, and the returned token ids are scored. Neither learner state nor
DeepSpeed nor a run is needed.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from deskrl.core import rpc
from deskrl.core.config import RunConfig
from deskrl.core.file_io import write_json
from deskrl.core.prompt_rendering import read_vocab_size, suppressed_ids
from deskrl.learner.policy.policy_model import load_policy, load_processor
from deskrl.learner.policy.probe_prompt import ProbePrompt, make_probe_prompt
from deskrl.proto.v1 import inference_pb2, inference_pb2_grpc

NUM_ACTIONS = 8
TEMPERATURE = 1.0
_ACT_TIMEOUT_S = 60.0
_START_TIMEOUT_S = 600.0
_POLL_S = 0.2


def main(config: RunConfig, outcome: Path) -> int:
    """Compare the checkpoint at `model.path` with the engine at `inference.address` and write the differences.

    Args:
        config: run configuration of the engine.
        outcome: result file with the keys "path", "num_tokens", "mean_difference" and "max_difference"; differences
            are those of logprobs.

    Returns:
        The exit status, 0.
    """
    folder = config.model_folder
    processor = load_processor(folder)
    suppressed = suppressed_ids(processor.tokenizer, read_vocab_size(folder))
    policy = load_policy(folder, suppressed, freeze_vision=True, architecture=config.model.architecture)
    probe = make_probe_prompt(*config.image_size)
    _wait_until_serving(config.inference.address)
    actions = _sample_actions(config, probe)
    rows = [probe.row(action.prompt_ids, action.action_ids, action.logprobs) for action in actions]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy.to(device)
    with torch.no_grad():
        scores = policy(batch := probe.collator(policy, processor).collate(rows).to(device), TEMPERATURE)
    difference_N = (scores.logprobs_N - batch.behaviour_logprobs_N).abs()
    write_json(outcome, {"path": str(folder), "num_tokens": len(difference_N), **_summary(difference_N)})
    return 0


def _summary(difference_N: Any) -> dict[str, float]:
    return {"mean_difference": float(difference_N.mean()), "max_difference": float(difference_N.max())}


def _wait_until_serving(address: str) -> None:
    """Wait for the engine, which may still be starting; raises TimeoutError after _START_TIMEOUT_S."""
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while not rpc.check_health(address):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"no engine serves the checkpoint at {address} after {_START_TIMEOUT_S:g} s")
        time.sleep(_POLL_S)


def _sample_actions(config: RunConfig, probe: ProbePrompt) -> list[inference_pb2.SampledAction]:
    """Return actions that the engine samples for the probe prompt."""
    actions = []
    with rpc.connect_sync(config.inference.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for seed in range(NUM_ACTIONS):
            request = inference_pb2.ActRequest(
                peer=rpc.peer("learner", "proof"),
                request_id=f"proof-{seed}",
                messages=[probe.message],
                images=[probe.image],
                temperature=TEMPERATURE,
                max_tokens=config.inference.max_action_tokens,
                seed=seed,
            )
            actions.append(stub.Act(request, timeout=_ACT_TIMEOUT_S).action)
    return actions
