"""Helpers for tests of the DeepSpeed engine: rows of the toy task, and functions run in several ranks.

A process can join only one process group, so every `DeepSpeedEngine` is created in child processes.
"""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from deskrl.core.config import LearnerConfig
from deskrl.core.ids import image_hash
from deskrl.core.prompt_rendering import read_vocab_size, suppressed_ids
from deskrl.core.step_codec import Step
from deskrl.learner.batches.collator import Collator
from deskrl.learner.batches.micro_batch_loader import MicroBatchLoader
from deskrl.learner.batches.packing import Row, pack
from deskrl.learner.losses import imitation_loss
from deskrl.learner.policy import deepspeed_engine
from deskrl.learner.policy.deepspeed_engine import DeepSpeedEngine, StepOutcome
from deskrl.learner.policy.policy_model import Policy, load_policy, load_processor, make_collator

Episode = tuple[list[Step], list[bytes], float]
"""Steps, screenshots and reward."""
SHOTS: dict[str, bytes] = {}
"""Screenshots of all rows by hash."""
_RANK = """
import importlib, pickle, sys
paths, module, name, arguments = pickle.load(open(sys.argv[1], "rb"))
sys.path[:0] = paths
getattr(importlib.import_module(module), name)(*arguments)
"""


def load(folder: Path) -> tuple[Policy, Collator]:
    processor = load_processor(folder)
    policy = load_policy(folder, suppressed_ids(processor.tokenizer, read_vocab_size(folder)), freeze_vision=False)
    return policy, make_collator(policy, processor, lambda hashes: {name: SHOTS[name] for name in hashes})


def make_rows(episodes: Sequence[Episode], share: bool = True) -> list[Row]:
    SHOTS.update({image_hash(shot): shot for _, shots, _ in episodes for shot in shots})
    return [
        row
        for index, (steps, _, _) in enumerate(episodes)
        for row in pack(index, steps, [[0] * len(step.action_ids) for step in steps], share)
    ]


def take_step(
    engine: DeepSpeedEngine, loader: MicroBatchLoader, shard: Sequence[Sequence[Row]], denominator: float = 10.0
) -> StepOutcome:
    """Take one optimizer step on the imitation loss of this rank's shard."""
    with engine.accumulate_gradients(len(shard)):
        for micro in loader.load(shard):
            scores = engine.forward(micro, temperature=1.0)
            engine.backward(imitation_loss(scores.logprobs_N, denominator))
    return engine.step()


@contextmanager
def sharding_as_of_a_large_model() -> Iterator[None]:
    """Create engines within the context that release parameters of any size, and prefetch few (ZeRO 3)."""
    whole = deepspeed_engine._deepspeed_config
    zero = {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 200_000,
        "stage3_prefetch_bucket_size": 100_000,
    }

    def config_of(config: LearnerConfig) -> dict[str, Any]:
        settings = whole(config)
        return {**settings, "zero_optimization": settings["zero_optimization"] | zero}

    with patch.object(deepspeed_engine, "_deepspeed_config", config_of):
        yield


def run_in_ranks(function: Callable[..., None], num_ranks: int, *arguments: Any) -> str:
    """Run a function of a test module in several ranks; return their standard error."""
    source = Path(inspect.getfile(function)).resolve()
    paths = [str(source.parent), str(Path(__file__).resolve().parent)]
    launcher = [sys.executable]
    if num_ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    with TemporaryDirectory() as folder:
        script, call = Path(folder) / "rank.py", Path(folder) / "call"
        script.write_text(_RANK)
        call.write_bytes(pickle.dumps((paths, source.stem, function.__name__, arguments)))
        done = subprocess.run([*launcher, str(script), str(call)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr
