"""What engine tests share: the toy task's rows, and functions run in ranks of their own.

A world of ranks is once a process, so whatever makes an `Engine` runs in child processes.
"""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from deskrl.core.ids import image_hash
from deskrl.core.rendering import suppressed_ids, vocab_size_of
from deskrl.core.trajectory import Step
from deskrl.learner.batches.batch import Collator, MicroBatch
from deskrl.learner.batches.feed import Feed
from deskrl.learner.batches.packing import Row, pack
from deskrl.learner.losses import imitation_loss
from deskrl.learner.policy.engine import Engine, UpdateOutcome
from deskrl.learner.policy.model import Policy, Scores, load_policy, load_processor, make_collator

Episode = tuple[list[Step], list[bytes], float]
"""Steps, their screenshots and the reward."""
SHOTS: dict[str, bytes] = {}
"""Screenshots by hash, of all rows that were made."""
_RANK = """
import importlib, pickle, sys
paths, module, name, arguments = pickle.load(open(sys.argv[1], "rb"))
sys.path[:0] = paths
getattr(importlib.import_module(module), name)(*arguments)
"""


def load(folder: Path) -> tuple[Policy, Collator]:
    processor = load_processor(folder)
    policy = load_policy(folder, suppressed_ids(processor.tokenizer, vocab_size_of(folder)), freeze_vision=False)
    return policy, make_collator(policy, processor, lambda hashes: {name: SHOTS[name] for name in hashes})


def rows_of(episodes: Sequence[Episode], share: bool = True) -> list[Row]:
    SHOTS.update({image_hash(shot): shot for _, shots, _ in episodes for shot in shots})
    return [
        row
        for index, (steps, _, _) in enumerate(episodes)
        for row in pack(index, steps, [[0] * len(step.action_ids) for step in steps], share)
    ]


def learn(engine: Engine, feed: Feed, share: Sequence[Sequence[Row]], denominator: float = 10.0) -> UpdateOutcome:
    """One optimizer step that imitates this rank's share."""

    def loss_of(index: int, micro: MicroBatch, scores: Scores) -> Tensor:
        return imitation_loss(scores.logprobs_N, denominator)

    return engine.update(feed.batches(share), len(share), 1.0, loss_of)


def in_ranks(function: Callable[..., None], num_ranks: int, *arguments: Any) -> str:
    """Runs a function of a test module in as many ranks; returns what they logged."""
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
