"""Benchmark of LoRA on one GPU: memory, time, size of a checkpoint, and cost of merging for the replicas.

Two optimizer steps are taken as in `gpu_learner.py`, on synthetic episodes and a model with the shape of UI-TARS-1.5-7B
and random weights (ZeRO 1, frozen vision tower, selective activation checkpointing), but of an adapter in all linear
layers of the language model. Then a checkpoint is written, and all weights are packed into buckets and hashed as for an
update of replicas, with the adapter merged and without it; nothing receives them.

Prints progress, then one JSON line. `ratio` is the peak memory of both steps divided by what `deskrl explain` predicts
for the longest micro-batch. `step_s` is the time of the second step.

    python tests/bench/gpu_lora.py [--model 7b] [--device cuda] [--rank 32] [--episodes 4]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from pathlib import Path

import torch
from gpu_learner import ACTION_TOKENS, OPENING_TOKENS, SIZE, BenchmarkSetup, learner_config, optimizer_step, say

from deskrl.core.config import LearnerConfig, LoraConfig, RunConfig
from deskrl.launch.sizing import footprint
from deskrl.launch.sizing.batch_sizes import trajectory_size
from deskrl.launch.sizing.model_shape import shape_from_name
from deskrl.learner.checkpoint.checkpoint_files import CheckpointStore
from deskrl.learner.checkpoint.checkpoint_writer import CheckpointWriter
from deskrl.learner.policy.deepspeed_engine import DeepSpeedEngine
from deskrl.learner.weights.bucket_sender import BucketSender, Gather
from deskrl.learner.weights.manifest import tensor_specs

NUM_STEPS = 2


def predict(options: argparse.Namespace, setup: BenchmarkSetup, learner: LearnerConfig) -> tuple[int, int]:
    """Return the predicted peak memory and size of a checkpoint in bytes; zeros for the tiny model."""
    shape = shape_from_name("UI-TARS-1.5-7B")
    if options.model != "7b" or shape is None:
        return 0, 0
    config = RunConfig.model_validate(
        {
            "model": {"build": "ui_tars_7b_shape"},
            "tasks": {"max_steps": options.steps},
            "agent": {"context": "episode"},
            "learner": learner.model_dump(),
        }
    )
    rows = trajectory_size(
        config, SIZE, 4 * setup.tokens_per_image, setup.tokens_per_image, OPENING_TOKENS, sum(ACTION_TOKENS) // 2
    )
    memory = footprint.learner_memory(config, shape, rows)
    say(f"predicted: {memory}")
    return memory.total, footprint.checkpoint_bytes(learner, shape)


def checkpoint_bytes(engine: DeepSpeedEngine, folder: Path) -> tuple[int, float]:
    """Write a checkpoint; return its size without the files of the tokenizer, and the seconds it takes."""
    store = CheckpointStore(folder / "checkpoints", folder, {})
    store.folder.mkdir()
    writer = CheckpointWriter(store, engine, keep=1)
    began_s = time.perf_counter()
    writer.begin("epoch_0", 0, {})
    writer.finish()
    seconds = time.perf_counter() - began_s
    own = [
        path for path in (store.folder / "epoch_0").rglob("*") if path.is_file() and not (folder / path.name).exists()
    ]
    return sum(path.stat().st_size for path in own), seconds


def publish_seconds(setup: BenchmarkSetup, engine: DeepSpeedEngine, gather: Gather) -> float:
    """Return the time to pack and hash all weights, best of three; on a CPU, the time to copy them."""
    tensors = engine.checkpoint_parameters()
    specs = tensor_specs(tensors)
    sender = BucketSender(setup.device) if setup.device.type == "cuda" else None
    if sender is not None:
        sender.prepare(specs)
    seconds = []
    for _ in range(3):
        began_s = setup.synchronise()
        if sender is not None:
            sender.send(list(tensors.values()), gather, {})
        else:
            with gather(list(tensors.values())) as whole:
                [tensor.detach().clone() for tensor in whole]
        seconds.append(setup.synchronise() - began_s)
    return min(seconds)


def main() -> None:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("7b", "tiny"), default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapter")
    parser.add_argument("--episodes", type=int, default=4, help="episodes per optimizer step")
    parser.add_argument("--steps", type=int, default=15, help="steps per episode")
    parser.add_argument("--tokens", type=int, default=20480, help="tokens per micro-batch")
    parser.add_argument("--activation-checkpointing", choices=("off", "selective", "full"), default="selective")
    parser.set_defaults(offload=False)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setup = BenchmarkSetup(options, folder)
        learner = learner_config(options, setup).model_copy(update={"lora": LoraConfig(rank=options.rank)})
        setup.policy.add_adapter(learner.lora, seed=0)
        engine = DeepSpeedEngine(setup.policy, learner)
        say(f"engine ready, {setup.peak_bytes() / 1e9:.1f} GB")
        seconds = []
        for _ in range(NUM_STEPS):
            step_s, rows, report = optimizer_step(setup, engine)
            seconds.append(step_s)
            say(f"{step_s:.1f} s, {len(rows)} rows, loss {report.loss:.4f}, gradient norm {report.gradient_norm:.4f}")
        peak_bytes = setup.peak_bytes()
        predicted_bytes, predicted_checkpoint_bytes = predict(options, setup, learner)
        size_bytes, writing_s = checkpoint_bytes(engine, folder)
        setup.peak_bytes()
        merged_s = publish_seconds(setup, engine, engine.gathered)
        publish_peak_bytes = setup.peak_bytes()
        base_s = publish_seconds(setup, engine, contextlib.nullcontext)
        engine.close()
    result = {
        "bench": "gpu_lora",
        "ratio": round(peak_bytes / predicted_bytes, 3) if predicted_bytes else None,
        "peak_gb": round(peak_bytes / 1e9, 2),
        "predicted_gb": round(predicted_bytes / 1e9, 2),
        "step_s": round(seconds[-1], 2),
        "seconds": [round(each, 2) for each in seconds],
        "checkpoint_bytes": size_bytes,
        "predicted_checkpoint_bytes": predicted_checkpoint_bytes,
        "checkpoint_s": round(writing_s, 2),
        "publish_merged_s": round(merged_s, 3),
        "publish_base_s": round(base_s, 3),
        "merge_s": round(merged_s - base_s, 3),
        "publish_peak_gb": round(publish_peak_bytes / 1e9, 2),
        "options": {key: str(value) for key, value in vars(options).items()},
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if setup.device.type == "cuda" else "cpu",
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
