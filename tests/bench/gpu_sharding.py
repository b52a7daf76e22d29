"""Benchmark of an optimizer step on several GPUs with whole (ZeRO 1) and sharded weights (ZeRO 3).

The workload is that of `deploy/runs/h200x4.toml`: synthetic episodes of three steps as in `gpu_learner.py`, a model of
UI-TARS-1.5-7B's shape, full activation checkpointing. The sides run one after another, each with its own ranks started
by torchrun: ZeRO 1, ZeRO 3 with the same micro-batches, ZeRO 3 with large ones. ZeRO 3 gathers the weights for every
micro-batch, so its cost depends on the number of micro-batches.

Prints progress, then one JSON line. `ratio` is the median time of a step with whole weights divided by that with
sharded weights and large micro-batches. Each side includes the time and memory that `deskrl explain` predicts.

    python tests/bench/gpu_sharding.py [--model 7b] [--device cuda] [--ranks 2] [--episodes 32] [--turns 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_learner import BenchmarkSetup, learner_config, optimizer_step, say

from deskrl.learner.policy.deepspeed_engine import DeepSpeedEngine

RUN = Path(__file__).resolve().parents[2] / "deploy" / "runs" / "h200x4.toml"
STEPS = 3
SIDES = ((1, 8192), (3, 8192), (3, 32768))
"""ZeRO stage and tokens per micro-batch of each side."""
SIDE_TIMEOUT_S = 400


def measure(options: argparse.Namespace, rank: int) -> None:
    """Run a warm-up step and the turns in one rank; rank 0 prints the measurements."""
    if options.device == "cuda":
        torch.cuda.set_device(rank)
        options.device = f"cuda:{rank}"
    with tempfile.TemporaryDirectory() as folder:
        setup = BenchmarkSetup(options, Path(folder), rank, options.ranks)
        config = learner_config(options, setup).model_copy(update={"zero_stage": options.stage})
        engine = DeepSpeedEngine(setup.policy, config)
        seconds, norm = [], 0.0
        for turn in range(options.turns + 1):
            step_s, _, report = optimizer_step(setup, engine)
            seconds += [step_s] if turn else []
            norm = report.gradient_norm
        if rank == 0:
            side = {"seconds": seconds, "gradient_norm": norm, "peak_gib": setup.peak_bytes() / 1024**3}
            print(json.dumps(side), flush=True)
        engine.close()


def measured(options: argparse.Namespace, stage: int, tokens: int) -> dict[str, Any]:
    """Return the measurements of one side, run in its own ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    given = [f"--{name}={getattr(options, name)}" for name in ("model", "device", "ranks", "episodes", "turns")]
    given += [f"--stage={stage}", f"--tokens={tokens}"]
    command = [sys.executable, *launcher, f"--log-dir={os.devnull}", __file__, *given]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=SIDE_TIMEOUT_S)
    side: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    side["step_s"] = statistics.median(side.pop("seconds"))
    say(f"ZeRO {stage}, {tokens} tokens: {side}")
    return {"zero_stage": stage, "micro_batch_tokens": tokens, **side, **predicted(options, stage, tokens)}


def predicted(options: argparse.Namespace, stage: int, tokens: int) -> dict[str, float]:
    """Return the predictions of `deskrl explain`; empty for a model other than that of the run."""
    if options.model != "7b":
        return {}
    settings = {
        "tasks.max_steps": STEPS,
        "tasks.num_rollouts": 4,
        "learner.grpo.groups_per_batch": options.episodes // 4,
    }
    settings |= {"learner.zero_stage": stage, "learner.micro_batch_tokens": tokens}
    settings |= {"learner.num_processes": options.ranks, "learner.devices": json.dumps(list(range(options.ranks)))}
    settings |= {"inference.devices": json.dumps([options.ranks, options.ranks + 1])}
    overrides = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "deskrl.cli.main", "explain", str(RUN), *overrides, "--json"]
    prediction = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    gib = sum(prediction["learner_memory"].values()) / 1024**3
    return {"foretold_step_s": prediction["timing"]["learning_s"], "foretold_peak_gib": gib}


def main() -> None:
    """Measure all sides and print the results; in a rank, measure its side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("7b", "tiny"), default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--episodes", type=int, default=32, help="episodes per optimizer step; a multiple of 4")
    parser.add_argument("--turns", type=int, default=5)
    for name in ("stage", "tokens"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(steps=STEPS, activation_checkpointing="full", offload=False)
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure(options, int(os.environ["LOCAL_RANK"]))
        return
    sides = [measured(options, stage, tokens) for stage, tokens in SIDES]
    result = {"bench": "gpu_sharding", "ratio": round(sides[0]["step_s"] / sides[-1]["step_s"], 3), "sides": sides}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
