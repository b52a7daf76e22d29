"""Acceptance criteria of a finished run, judged from the run's own records.

A criterion whose record is missing is not met. A criterion that the configuration does not ask for, or that nothing in
the run exercised, is not judged; its value says why. All functions are pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deskrl.core.config import RunConfig
from deskrl.core.group_outcome import FailureRule, group_failed, is_success
from deskrl.launch.confidence_intervals import newcombe_difference

MAX_MISMATCH_FLOAT32 = 1e-3
"""Upper bound on the mean |logprob difference| between engine and learner at the same version, in float32."""
MAX_MISMATCH_HALF = 3e-2
"""The same bound if either computes in 16 bits: two passes of vLLM over the same tokens differ by 0.02 in bfloat16."""
_NO_UPDATES = "disabled by learner.grpo.num_updates = 0"


@dataclass(frozen=True)
class Criterion:
    """One row of the acceptance table."""

    criterion: str
    ok: bool | None
    """None: not judged."""
    value: str
    how: str
    """How the value was measured."""


@dataclass(frozen=True)
class RunFacts:
    """Observations of the launcher that no metrics file contains."""

    num_restarts: int
    leftovers: Sequence[str]
    checkpoint: Mapping[str, Any] | None
    """Result of the checkpoint verification: {"path", "num_tokens", "mean_difference", "max_difference"} or {"error"};
    None: verification is disabled."""


@dataclass(frozen=True)
class Expected:
    """Criteria that the run configuration asks for."""

    eval_episodes: int
    min_gain: float | None
    success_buffer: bool
    replace_when: FailureRule
    success_threshold: float
    max_mismatch: float
    num_updates: int
    """0: the run ends after its warm start."""


def expected_of(config: RunConfig) -> Expected:
    """Return the criteria that a run configuration asks for."""
    return Expected(
        eval_episodes=config.learner.eval.num_episodes,
        min_gain=config.learner.eval.min_gain,
        success_buffer=config.learner.grpo.use_success_buffer,
        replace_when=config.learner.grpo.replace_when,
        success_threshold=config.replay.success_threshold,
        max_mismatch=MAX_MISMATCH_FLOAT32 if config.is_in_float32 else MAX_MISMATCH_HALF,
        num_updates=config.learner.grpo.num_updates,
    )


def judge(metrics: Sequence[Mapping[str, Any]], facts: RunFacts, expected: Expected) -> list[Criterion]:
    """Judge every criterion.

    Args:
        metrics: lines of metrics.jsonl, oldest first.
        facts: observations of the launcher.
        expected: criteria that the configuration asks for.
    """
    updates = [line for line in metrics if line["kind"] == "update"]
    return [
        _finishes(metrics, facts),
        _learns(metrics, expected),
        _no_task_worse(metrics, expected),
        _loss(updates, expected),
        _weights_confirmed(metrics, updates, expected),
        _mismatch(updates, expected),
        success_buffer_criterion(updates, expected),
        _checkpoint(facts.checkpoint, expected),
        _nothing_left(facts),
    ]


def _finishes(metrics: Sequence[Mapping[str, Any]], facts: RunFacts) -> Criterion:
    finished = any(line["kind"] == "phase" and line["phase"] == "finished" for line in metrics)
    value = f"{'finished' if finished else 'not finished'}, {facts.num_restarts} restarts"
    return Criterion("the run finishes", finished and facts.num_restarts == 0, value, "no role was restarted")


def _evals(metrics: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    found = {line["when"]: line for line in metrics if line["kind"] == "eval"}
    return (found["before"], found["after"]) if {"before", "after"} <= found.keys() else None


def _learns(metrics: Sequence[Mapping[str, Any]], expected: Expected) -> Criterion:
    name = "success rate rises"
    how = f"at least {expected.eval_episodes} fresh sampled episodes each, before and after GRPO"
    if expected.min_gain is not None:
        how += f"; 95 % interval of the gain above {100 * expected.min_gain:+.0f} points"
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
        value += f"; {num_other} not counted (sampled by another policy version)"
    if expected.min_gain is None:
        return Criterion(name, None, value, how)
    enough = min(before["episodes"], after["episodes"]) >= expected.eval_episodes
    # Judged by the interval: the gain that the same two policies show varies by ten points from sample to sample.
    return Criterion(name, enough and low > expected.min_gain, value, how)


def _no_task_worse(metrics: Sequence[Mapping[str, Any]], expected: Expected) -> Criterion:
    name, how = "no task gets worse", "95 % interval of each task's gain, before and after, not below 0"
    evals = _evals(metrics)
    if evals is None:
        return _not_evaluated(name, how, expected)
    before, after = evals[0]["per_task"], {task: {"n": 0, "success": 0} for task in evals[0]["per_task"]}
    after |= evals[1]["per_task"]
    rates = {task: (_rate(before[task]), _rate(after[task])) for task in sorted(before)}
    value = ", ".join(f"{task} {old:.0%} -> {new:.0%}" for task, (old, new) in rates.items())
    not_worse = all(_can_be_as_good(before[task], after[task]) for task in before)
    return Criterion(name, None if expected.min_gain is None else not_worse, value, how)


def _not_evaluated(name: str, how: str, expected: Expected) -> Criterion:
    if expected.eval_episodes == 0:
        return Criterion(name, None, "disabled by learner.eval.num_episodes = 0", how)
    return Criterion(name, False, "the evaluations before and after are not both recorded", how)


def _can_be_as_good(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Return whether the counts of a task leave it open that its success rate has not fallen."""
    _, _, high = newcombe_difference(before["success"], before["n"], after["success"], after["n"])
    return bool(after["n"] and high >= 0)


def _rate(count: Mapping[str, Any]) -> float:
    return float(count["success"] / count["n"]) if count["n"] else 0.0


def _loss(updates: Sequence[Mapping[str, Any]], expected: Expected) -> Criterion:
    name, how = "the loss is finite and changes", "loss of every update"
    if expected.num_updates == 0:
        return Criterion(name, None, _NO_UPDATES, how)
    losses = [line["loss"] for line in updates]
    ok = len(losses) > 1 and all(math.isfinite(loss) for loss in losses) and len(set(losses)) > 1
    value = f"{len(losses)} updates, {min(losses):.4f} to {max(losses):.4f}" if losses else "no update"
    return Criterion(name, ok, value, how)


def _weights_confirmed(
    metrics: Sequence[Mapping[str, Any]], updates: Sequence[Mapping[str, Any]], expected: Expected
) -> Criterion:
    weights = [line for line in metrics if line["kind"] == "weights"]
    confirmed = [line for line in weights if line["ok"]]
    worst = max((line["canary_max_difference"] for line in confirmed), default=math.nan)
    has_updates = bool(updates) or expected.num_updates == 0
    ok = has_updates and len(confirmed) == len(weights) and len(confirmed) > len(updates)
    value = f"{len(confirmed)} of {len(weights)} confirmed, canary difference at most {worst:.1e}"
    return Criterion(
        "every replica confirmed every weight update", ok, value, "checksums of all tensors and canary logprobs"
    )


def _mismatch(updates: Sequence[Mapping[str, Any]], expected: Expected) -> Criterion:
    name = "behaviour policy and learner agree"
    how = f"|logprob difference| at the same policy version; mean below {expected.max_mismatch:g}"
    if expected.num_updates == 0:
        return Criterion(name, None, _NO_UPDATES, how)
    seen = [line for line in updates if line.get("mismatch_mean") is not None]
    if not seen:
        return Criterion(name, False, "no token was compared", how)
    mean = sum(line["mismatch_mean"] for line in seen) / len(seen)
    largest = max(line["mismatch_max"] for line in seen)
    return Criterion(name, mean < expected.max_mismatch, f"mean {mean:.1e}, max {largest:.1e}", how)


def success_buffer_criterion(updates: Sequence[Mapping[str, Any]], expected: Expected) -> Criterion:
    """Judge whether every failed group whose task had a stored success was given one."""
    name, how = "the success buffer is used", "every failed group whose task had a stored success was given one"
    if not expected.success_buffer:
        return Criterion(name, None, "disabled by learner.grpo.use_success_buffer", how)
    if any("groups" not in line for line in updates):
        return Criterion(name, None, "not recorded: an earlier version of deskrl wrote this run", how)
    eligible = eligible_groups(updates, expected)
    withheld = [group for group in eligible if not group["used_candidate"]]
    num_used = len(eligible) - len(withheld)
    if withheld:
        tasks = ", ".join(sorted({group["task_id"] for group in withheld}))
        return Criterion(name, False, f"used {num_used} times, withheld {len(withheld)} times ({tasks})", how)
    if num_used == 0:
        return Criterion(name, None, "not exercised: no group of a task with a stored success failed", how)
    return Criterion(name, True, f"used {num_used} times, never withheld", how)


def eligible_groups(updates: Sequence[Mapping[str, Any]], expected: Expected) -> list[Mapping[str, Any]]:
    """Return the groups that failed when the success buffer held a success of their task (ARPO, section 3.2).

    The buffer is recomputed here from the rewards of all earlier groups, independently of the replay service: a group's
    own successes are stored after the decision about the group. Groups that were rejected for other reasons (faults,
    staleness) are not eligible, but their successes are stored.
    """
    stored: set[str] = set()
    eligible = []
    for line in {line["update"]: line for line in updates}.values():  # a resumed run repeats its last update
        for group in line.get("groups", ()):
            failed = group_failed(group["rewards"], expected.replace_when, expected.success_threshold)
            if failed and group["task_id"] in stored and group["dropped_because"] not in ("faults", "stale"):
                eligible.append(group)
            if any(is_success(reward, expected.success_threshold) for reward in group["rewards"]):
                stored.add(group["task_id"])
    return eligible


def _checkpoint(proof: Mapping[str, Any] | None, expected: Expected) -> Criterion:
    name = "the checkpoint is valid"
    how = f"|logprob difference| between transformers and a fresh vLLM; mean below {expected.max_mismatch:g}"
    if proof is None:
        return Criterion(name, None, "disabled by learner.verify_checkpoint", how)
    if "error" in proof:
        return Criterion(name, False, str(proof["error"]), how)
    mean, largest = proof["mean_difference"], proof["max_difference"]
    value = f"{proof['num_tokens']} tokens, mean {mean:.1e}, max {largest:.1e}"
    return Criterion(name, mean < expected.max_mismatch, value, how)


def _nothing_left(facts: RunFacts) -> Criterion:
    value = "; ".join(facts.leftovers[:3]) or "nothing"
    how = "processes, desktops, sockets, mounts and temporary files of the run after its end"
    return Criterion("nothing is left behind", not facts.leftovers, value, how)
