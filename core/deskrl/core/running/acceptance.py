"""Judges a finished run by its own records: each criterion with its value and how it is known. Pure: no I/O.

A criterion that cannot be known is not met; none is left out because its record is missing. What the run's
configuration does not ask for is not judged, and told to be so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deskrl.core.config import RunConfig
from deskrl.core.stats import newcombe_difference

MAX_MISMATCH_FLOAT32 = 1e-3
"""Largest mean |difference| of logprobs between the engine and the learner at the same version."""
MAX_MISMATCH_HALF = 3e-2
"""The same where either computes in fewer bits: vLLM's own passes over the same tokens differ by 0.02 in bfloat16."""


@dataclass(frozen=True)
class Criterion:
    """One row of the table that a run ends with."""

    criterion: str
    ok: bool | None
    """None: not asked for, and not judged."""
    value: str
    how: str


@dataclass(frozen=True)
class RunFacts:
    """What the launcher saw that is in no metrics file."""

    num_restarts: int
    leftovers: Sequence[str]
    checkpoint: Mapping[str, Any] | None
    """Outcome of the checkpoint's proof: {"path", "num_tokens", "mean_difference", "max_difference"}, or {"error"};
    None: it was not asked for."""


@dataclass(frozen=True)
class Expected:
    """What a run's configuration asks of it."""

    eval_episodes: int
    min_gain: float | None
    replay: bool
    max_mismatch: float


def expected_of(config: RunConfig) -> Expected:
    """Read it off the configuration."""
    return Expected(
        eval_episodes=config.learner.eval.episodes,
        min_gain=config.learner.eval.min_gain,
        replay=config.learner.grpo.replay_successes,
        max_mismatch=MAX_MISMATCH_FLOAT32 if config.is_in_float32 else MAX_MISMATCH_HALF,
    )


def judge(metrics: Sequence[Mapping[str, Any]], facts: RunFacts, expected: Expected) -> list[Criterion]:
    """All criteria of a run with imitation, GRPO, evaluations and replay."""
    updates = [line for line in metrics if line["kind"] == "update"]
    return [
        _finishes(metrics, facts),
        _learns(metrics, expected),
        _no_task_worse(metrics, expected),
        _loss(updates),
        _weights_confirmed(metrics, updates),
        _mismatch(updates, expected),
        _replay(metrics, updates, expected),
        _checkpoint(facts.checkpoint, expected),
        _nothing_left(facts),
    ]


def _finishes(metrics: Sequence[Mapping[str, Any]], facts: RunFacts) -> Criterion:
    finished = any(line["kind"] == "phase" and line["phase"] == "finished" for line in metrics)
    value = f"{'finished' if finished else 'not finished'}, {facts.num_restarts} restarts"
    return Criterion("it finishes", finished and facts.num_restarts == 0, value, "no role crashed or was restarted")


def _evals(metrics: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    found = {line["when"]: line for line in metrics if line["kind"] == "eval"}
    return (found["before"], found["after"]) if {"before", "after"} <= found.keys() else None


def _learns(metrics: Sequence[Mapping[str, Any]], expected: Expected) -> Criterion:
    name, how = "it learns", f"{expected.eval_episodes} or more fresh sampled episodes each, before and after GRPO"
    if expected.min_gain is not None:
        how += f"; at least +{expected.min_gain:.0%}"
    evals = _evals(metrics)
    if evals is None:
        return _not_evaluated(name, how, expected)
    before, after = evals
    difference, low, high = newcombe_difference(
        before["successes"], before["episodes"], after["successes"], after["episodes"]
    )
    value = (
        f"{before['successes']}/{before['episodes']} -> {after['successes']}/{after['episodes']}: "
        f"{100 * difference:+.0f} points [{100 * low:+.0f}, {100 * high:+.0f}]"
    )
    if num_other := sum(line.get("num_other_version", 0) for line in evals):
        value += f"; {num_other} not counted, another policy version acted in them"
    if expected.min_gain is None:
        return Criterion(name, None, value, how)
    enough = min(before["episodes"], after["episodes"]) >= expected.eval_episodes
    return Criterion(name, enough and difference >= expected.min_gain, value, how)


def _no_task_worse(metrics: Sequence[Mapping[str, Any]], expected: Expected) -> Criterion:
    name, how = "no task gets worse", "success of each task, after against before"
    evals = _evals(metrics)
    if evals is None:
        return _not_evaluated(name, how, expected)
    before, after = evals[0]["per_task"], evals[1]["per_task"]
    rates = {task: (_rate(before[task]), _rate(after.get(task, {"n": 0, "success": 0}))) for task in before}
    value = ", ".join(f"{task} {old:.0%} -> {new:.0%}" for task, (old, new) in sorted(rates.items()))
    not_worse = all(new >= old for old, new in rates.values())
    return Criterion(name, None if expected.min_gain is None else not_worse, value, how)


def _not_evaluated(name: str, how: str, expected: Expected) -> Criterion:
    if expected.eval_episodes == 0:
        return Criterion(name, None, "not asked for: learner.eval.episodes = 0", how)
    return Criterion(name, False, "no evaluation before and after", how)


def _rate(count: Mapping[str, Any]) -> float:
    return float(count["success"] / count["n"]) if count["n"] else 0.0


def _loss(updates: Sequence[Mapping[str, Any]]) -> Criterion:
    losses = [line["loss"] for line in updates]
    ok = len(losses) > 1 and all(math.isfinite(loss) for loss in losses) and len(set(losses)) > 1
    value = f"{len(losses)} updates, {min(losses):.4f} to {max(losses):.4f}" if losses else "no update"
    return Criterion("loss is finite and changes", ok, value, "the loss of every update")


def _weights_confirmed(metrics: Sequence[Mapping[str, Any]], updates: Sequence[Mapping[str, Any]]) -> Criterion:
    weights = [line for line in metrics if line["kind"] == "weights"]
    confirmed = [line for line in weights if line["ok"]]
    worst = max((line["canary_max_difference"] for line in confirmed), default=math.nan)
    ok = bool(updates) and len(confirmed) == len(weights) and len(confirmed) > len(updates)
    value = f"{len(confirmed)} of {len(weights)} confirmed, canary within {worst:.1e}"
    return Criterion(
        "every replica confirmed each update", ok, value, "checksums of all tensors and a canary's logprobs"
    )


def _mismatch(updates: Sequence[Mapping[str, Any]], expected: Expected) -> Criterion:
    how = f"behaviour logprobs against the learner's forward pass, same version; mean below {expected.max_mismatch:g}"
    seen = [line for line in updates if line.get("mismatch_mean") is not None]
    if not seen:
        return Criterion("the weights that act are those learnt", False, "no token was compared", how)
    mean = sum(line["mismatch_mean"] for line in seen) / len(seen)
    largest = max(line["mismatch_max"] for line in seen)
    value = f"|difference| mean {mean:.1e}, max {largest:.1e}"
    return Criterion("the weights that act are those learnt", mean < expected.max_mismatch, value, how)


def _replay(
    metrics: Sequence[Mapping[str, Any]], updates: Sequence[Mapping[str, Any]], expected: Expected
) -> Criterion:
    name, how = "replay is at work", "stored successes per task; used at least once"
    if not expected.replay:
        return Criterion(name, None, "not asked for: learner.grpo.replay_successes is off", how)
    stored: Mapping[str, int] = next((line["stored"] for line in reversed(metrics) if line["kind"] == "replay"), {})
    num_used = sum(line.get("replayed", 0) for line in updates)
    value = f"used {num_used} times; stored " + ", ".join(f"{task} {num}" for task, num in sorted(stored.items()))
    return Criterion(name, num_used > 0 and bool(stored), value, how)


def _checkpoint(proof: Mapping[str, Any] | None, expected: Expected) -> Criterion:
    name = "the checkpoint is valid"
    how = (
        f"the last checkpoint in transformers and in a fresh vLLM: logprobs alike, mean below {expected.max_mismatch:g}"
    )
    if proof is None:
        return Criterion(name, None, "not asked for: learner.prove_checkpoint is off", how)
    if "error" in proof:
        return Criterion(name, False, str(proof["error"]), how)
    mean, largest = proof["mean_difference"], proof["max_difference"]
    value = f"{proof['num_tokens']} tokens, |difference| mean {mean:.1e}, max {largest:.1e}"
    return Criterion(name, mean < expected.max_mismatch, value, how)


def _nothing_left(facts: RunFacts) -> Criterion:
    value = "; ".join(facts.leftovers[:3]) or "nothing"
    how = "processes, desktops, sockets, mounts and temporary files of the run, after its end"
    return Criterion("nothing is left", not facts.leftovers, value, how)
