"""What the learner tells Prometheus. Knows names and units; measures nothing itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

UPDATES = Counter("deskrl_learner_updates", "Batches learnt from.")
SKIPPED = Counter("deskrl_learner_skipped_updates", "Batches without an optimizer step.", ["cause"])
DROPPED = Counter("deskrl_learner_dropped_groups", "Groups not learnt from.", ["cause"])
REPLAYED = Counter("deskrl_learner_replayed_successes", "Stored successes put into a group.")
TOKENS = Counter("deskrl_learner_tokens", "Action tokens learnt from.")
LOSS = Gauge("deskrl_learner_loss", "Policy loss of the newest update.")
SUCCESS_RATE = Gauge("deskrl_learner_success_ratio", "Successes among the fresh episodes of the newest batch.")
GRADIENT_NORM = Gauge("deskrl_learner_gradient_norm", "Gradient norm of the newest update, before clipping.")
REWARD = Gauge("deskrl_learner_reward_mean", "Mean reward of the fresh episodes of the newest batch.")
CLIP_FRACTION = Gauge("deskrl_learner_clip_ratio", "Share of tokens whose ratio was clipped in the newest update.")
ENTROPY = Gauge("deskrl_learner_entropy_nats", "Entropy of a token, mean of the newest update.")
MISMATCH = Gauge(
    "deskrl_learner_mismatch_max_nats",
    "Largest difference of a sampled and a learnt logprob, of tokens that the learning version sampled itself.",
)
LAGGED_DIFFERENCE = Gauge(
    "deskrl_learner_lagged_difference_nats",
    "Mean difference of a sampled and a learnt logprob, of tokens that an earlier version sampled.",
)
STALENESS = Gauge("deskrl_learner_staleness_max_versions", "Staleness of the oldest token of the newest update.")
PHASE_SECONDS = Histogram(
    "deskrl_learner_phase_seconds",
    "Time of an update, by phase.",
    ["phase"],
    buckets=(0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
WEIGHT_UPDATES = Counter("deskrl_learner_weight_updates", "Updates of replicas, by outcome.", ["outcome"])
EPISODES = Counter(
    "deskrl_learner_episodes",
    "Fresh episodes of training batches, by the application of their task.",
    ["application", "outcome"],
)
UNCOUNTED = Counter(
    "deskrl_learner_uncounted_evaluation_episodes",
    "Episodes of evaluations that say nothing of the policy: faults, and those in which another version acted.",
    ["cause"],
)
POLICY_STEP = Gauge("deskrl_learner_policy_step", "Step of the policy version that was published last.")
WEIGHT_SECONDS = Histogram(
    "deskrl_learner_weight_update_seconds",
    "Time of a replica's update as the learner sees it: until all bytes had come (`receive`), and until it was proven.",
    ["part"],
    buckets=(0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
QUARANTINED = Gauge("deskrl_learner_quarantined_replicas", "Replicas that do not serve the newest weights.")

_GAUGES = {
    "loss": LOSS,
    "success_rate": SUCCESS_RATE,
    "average_reward": REWARD,
    "gradient_norm": GRADIENT_NORM,
    "clip_fraction": CLIP_FRACTION,
    "entropy": ENTROPY,
    "mismatch_max": MISMATCH,
    "lagged_difference_mean": LAGGED_DIFFERENCE,
    "staleness_max": STALENESS,
}
"""Gauges by the key of an update's record."""

# From the start all series are there, at zero: a rate sees the first one, and "none" is told apart from "not scraped".
for _cause in ("nothing_to_learn", "not_finite"):
    SKIPPED.labels(_cause)
for _cause in ("all_failed", "all_succeeded", "faults", "stale"):
    DROPPED.labels(_cause)
for _phase in ("wait", "learn", "publish", "checkpoint"):
    PHASE_SECONDS.labels(_phase)
for _outcome in ("confirmed", "failed"):
    WEIGHT_UPDATES.labels(_outcome)
for _cause in ("fault", "other_version"):
    UNCOUNTED.labels(_cause)

for _part in ("receive", "total"):
    WEIGHT_SECONDS.labels(_part)


def name_applications(applications: Iterable[str]) -> None:
    """Have the series of these applications there from the start."""
    for application in applications:
        for outcome in ("solved", "failed"):
            EPISODES.labels(application, outcome)


def application_of(task: Mapping[str, Any]) -> str:
    """Which application a task is about, as its file says; few values, so that it can be a label."""
    apps = task.get("related_apps") or ["none"]
    return str(apps[0]) if len(apps) == 1 else "several"


def note_weights(record: Mapping[str, Any]) -> None:
    """Take over a replica's record of an update."""
    WEIGHT_UPDATES.labels("confirmed" if record["ok"] else "failed").inc()
    for part in ("receive", "total") if record["ok"] else ():
        WEIGHT_SECONDS.labels(part).observe(record[f"{part}_ms"] / 1e3)


def note_evaluation(record: Mapping[str, Any]) -> None:
    """Take over an evaluation's record."""
    UNCOUNTED.labels("fault").inc(record["num_faulted"])
    UNCOUNTED.labels("other_version").inc(record["num_other_version"])


def note_update(record: Mapping[str, Any], seconds: Mapping[str, float], applications: Mapping[str, str]) -> None:
    """Take over an update's record.

    Args:
        record: as it is written down.
        seconds: of its phases.
        applications: of the tasks by their ids.
    """
    UPDATES.inc()
    for task_id, count in record["per_task"].items():
        EPISODES.labels(applications[task_id], "solved").inc(count["success"])
        EPISODES.labels(applications[task_id], "failed").inc(count["n"] - count["success"])
    if not record["applied"]:
        SKIPPED.labels("not_finite" if record["num_trajectories"] else "nothing_to_learn").inc()
    for cause, num in record["dropped"].items():
        DROPPED.labels(cause).inc(num)
    REPLAYED.inc(record["replayed"])
    TOKENS.inc(record["num_tokens"])
    for key, gauge in _GAUGES.items():
        if record[key] is not None:
            gauge.set(record[key])
    for phase, phase_s in seconds.items():
        PHASE_SECONDS.labels(phase).observe(phase_s)
