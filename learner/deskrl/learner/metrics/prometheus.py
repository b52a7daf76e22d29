"""Prometheus metrics of the learner."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

UPDATES = Counter("deskrl_learner_updates", "Batches trained on.")
SKIPPED = Counter("deskrl_learner_skipped_updates", "Batches without an optimizer step.", ["cause"])
DROPPED = Counter("deskrl_learner_dropped_groups", "Groups not trained on.", ["cause"])
REPLAYED = Counter("deskrl_learner_replayed_successes", "Stored successes that replaced a member of a group.")
TOKENS = Counter("deskrl_learner_tokens", "Action tokens trained on.")
LOSS = Gauge("deskrl_learner_loss", "Loss of the latest update, with KL penalty and entropy bonus.")
SUCCESS_RATE = Gauge("deskrl_learner_success_ratio", "Share of successes among the fresh episodes of the latest batch.")
GRADIENT_NORM = Gauge("deskrl_learner_gradient_norm", "Gradient norm of the latest update, before clipping.")
REWARD = Gauge("deskrl_learner_reward_mean", "Mean reward of the fresh episodes of the latest batch.")
REWARD_TERM = Gauge(
    "deskrl_learner_reward_term_mean",
    "Mean of each term of the reward over the fresh episodes of the latest batch, if there are several terms.",
    ["term"],
)
CLIP_FRACTION = Gauge("deskrl_learner_clip_ratio", "Share of tokens whose gradient was clipped in the latest update.")
ENTROPY = Gauge("deskrl_learner_entropy_nats", "Mean entropy of the tokens of the latest update.")
KL = Gauge(
    "deskrl_learner_kl_nats",
    "Mean estimated KL divergence of the tokens of the latest update from the reference policy, with a KL penalty.",
)
MISMATCH = Gauge(
    "deskrl_learner_mismatch_max_nats",
    "Largest difference between behaviour and learner logprob of tokens that the current version sampled.",
)
LAGGED_DIFFERENCE = Gauge(
    "deskrl_learner_lagged_difference_nats",
    "Mean difference between behaviour and learner logprob of tokens that an earlier version sampled.",
)
STALENESS = Gauge("deskrl_learner_staleness_max_versions", "Staleness of the oldest token of the latest update.")
PHASE_SECONDS = Histogram(
    "deskrl_learner_phase_seconds",
    "Duration of an update, by phase.",
    ["phase"],
    buckets=(0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
WEIGHT_UPDATES = Counter("deskrl_learner_weight_updates", "Weight updates of replicas, by outcome.", ["outcome"])
EPISODES = Counter(
    "deskrl_learner_episodes",
    "Fresh episodes of training batches, by application of the task and outcome.",
    ["application", "outcome"],
)
UNCOUNTED = Counter(
    "deskrl_learner_uncounted_evaluation_episodes",
    "Evaluation episodes that do not count: faults, and episodes in which another policy version acted.",
    ["cause"],
)
POLICY_STEP = Gauge("deskrl_learner_policy_step", "Step of the latest published policy version.")
WEIGHT_SECONDS = Histogram(
    "deskrl_learner_weight_update_seconds",
    "Duration of a replica's weight update: until it is received (`receive`) and until it is verified (`total`).",
    ["part"],
    buckets=(0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
QUARANTINED = Gauge("deskrl_learner_quarantined_replicas", "Replicas that do not serve the latest weights.")

_GAUGES = {
    "loss": LOSS,
    "success_rate": SUCCESS_RATE,
    "average_reward": REWARD,
    "gradient_norm": GRADIENT_NORM,
    "clip_fraction": CLIP_FRACTION,
    "entropy": ENTROPY,
    "kl": KL,
    "mismatch_max": MISMATCH,
    "lagged_difference_mean": LAGGED_DIFFERENCE,
    "staleness_max": STALENESS,
}
"""Gauge of each key of an update's record."""

# Create all series at zero, so that rates include the first increment and "none" differs from "not scraped".
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


def create_application_series(applications: Iterable[str]) -> None:
    """Create the series of these applications at zero."""
    for application in applications:
        for outcome in ("solved", "failed"):
            EPISODES.labels(application, outcome)


def application_of(task: Mapping[str, Any]) -> str:
    """Return the application of a task as a label: its only related application, `several` or `none`."""
    apps = task.get("related_apps") or ["none"]
    return str(apps[0]) if len(apps) == 1 else "several"


def observe_weight_update(record: Mapping[str, Any]) -> None:
    """Count a weight update of a replica, given its record."""
    WEIGHT_UPDATES.labels("confirmed" if record["ok"] else "failed").inc()
    for part in ("receive", "total") if record["ok"] else ():
        WEIGHT_SECONDS.labels(part).observe(record[f"{part}_ms"] / 1e3)


def observe_evaluation(record: Mapping[str, Any]) -> None:
    """Count the episodes of an evaluation that do not count, given its record."""
    UNCOUNTED.labels("fault").inc(record["num_faulted"])
    UNCOUNTED.labels("other_version").inc(record["num_other_version"])


def observe_update(record: Mapping[str, Any], seconds: Mapping[str, float], applications: Mapping[str, str]) -> None:
    """Set the metrics of an update.

    Args:
        record: record of the update.
        seconds: duration of each phase.
        applications: application of each task.
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
    for name, value in record["reward_terms"].items():
        REWARD_TERM.labels(name).set(value)
    for phase, phase_s in seconds.items():
        PHASE_SECONDS.labels(phase).observe(phase_s)
