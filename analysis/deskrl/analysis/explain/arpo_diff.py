"""Table of the differences between the ARPO paper, ARPO's code and a run.

The paper is arXiv:2505.16282. The code is github.com/dvlab-research/ARPO at 7489ae3 with
`examples/osworld_full_arpo.sh`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deskrl.core.config import RunConfig

_ADVANTAGES = {"centred": "r - mean", "standardised": "(r - mean) / (sample std + 1e-6)"}
_SLOTS = {"first": "the first member", "random": "a random member", "oldest": "the oldest member"}
_PLAIN_LOSSES = ("grpo", "gspo", "cispo")
"""Losses without regularisation of their own."""


@dataclass(frozen=True)
class ArpoDifference:
    """One row of the table."""

    topic: str
    paper: str
    code: str
    run: str
    keys: str
    """Configuration keys that set the run's value; empty if it is not configurable."""


@dataclass(frozen=True)
class _Row:
    topic: str
    paper: str
    code: str
    run: Callable[[RunConfig], str]
    keys: str = ""


def _batch(config: RunConfig) -> str:
    grpo = config.learner.grpo
    tasks, rollouts = grpo.groups_per_batch, config.tasks.num_rollouts
    step = tasks * rollouts / grpo.num_minibatches
    steps = "step" if grpo.num_minibatches == 1 else "steps"
    return f"{tasks} tasks x {rollouts} = {tasks * rollouts}; {grpo.num_minibatches} optimizer {steps} of {step:g}"


def _reward(config: RunConfig) -> str:
    penalty = config.learner.grpo.format_penalty
    weights = {f"{name} ({term.kind})": term.weight for name, term in config.reward.terms.items() if term.weight}
    terms = " + ".join(f"{weight / sum(weights.values()):.2g} {name}" for name, weight in weights.items())
    is_evaluator = [term.kind for term in config.reward.terms.values() if term.weight] == ["evaluators"]
    reward = "evaluator" if is_evaluator else terms
    return f"{reward} - {penalty:g} if the last action does not parse" if penalty else f"{reward} only"


def _format_end(config: RunConfig) -> str:
    if config.agent.format_error == "evaluate":
        return "ends the episode, the state is evaluated"
    return "ends the episode with evaluator reward 0"


def _advantage(config: RunConfig) -> str:
    grpo = config.learner.grpo
    formula = _ADVANTAGES.get(grpo.advantage, grpo.advantage)
    return formula if grpo.negative_advantage_scale == 1 else f"{formula}, negative x {grpo.negative_advantage_scale:g}"


def _clip(config: RunConfig) -> str:
    grpo = config.learner.grpo
    if grpo.loss != "grpo":
        return f"that of the loss {grpo.loss}"
    dual = f", dual {grpo.dual_clip:g}" if grpo.dual_clip else ""
    return f"-{grpo.clip_low:g} / +{grpo.clip_high:g}{dual}"


def _regularisation(config: RunConfig) -> str:
    grpo = config.learner.grpo
    parts = [] if grpo.loss in _PLAIN_LOSSES else [f"that of the loss {grpo.loss}"]
    if grpo.kl_coefficient:
        parts.append(f"KL {grpo.kl_coefficient:g} ({grpo.kl_estimator}) in the {grpo.kl_applied_to}")
    if grpo.entropy_coefficient:
        parts.append(f"entropy bonus {grpo.entropy_coefficient:g}")
    return ", ".join(parts) or "off"


def _proximal_policy(config: RunConfig) -> str:
    grpo = config.learner.grpo
    if grpo.importance_weighting == "off":
        return "the policy before the update; no correction for the sampling policy"
    return f"the policy before the update, times pi_prox / pi_behaviour up to {grpo.importance_cap:g}"


def _loss_reduction(config: RunConfig) -> str:
    grpo = config.learner.grpo
    if grpo.loss_denominator == "trajectory_tokens":
        return "mean of the trajectories' token means"
    return f"sum over tokens / ({grpo.loss_denominator_tokens} x trajectories)"


def _replacement(config: RunConfig) -> str:
    if not config.learner.grpo.use_success_buffer:
        return "off"
    rule = (
        f"no reward above {config.replay.success_threshold:g}"
        if config.learner.grpo.replace_when == "all_failed"
        else "std < 0.05 and mean < 0.2"
    )
    return f"{rule}: a stored success replaces {_SLOTS[config.learner.grpo.replace_slot]}"


def _success_sampling(config: RunConfig) -> str:
    if not config.learner.grpo.use_success_buffer:
        return "not used"
    return "uniform" if config.replay.success_sampling == "uniform" else "the newest"


def _success_buffer(config: RunConfig) -> str:
    if not config.learner.grpo.use_success_buffer:
        return "not used"
    replay = config.replay
    return f"{replay.successes_per_task} per task, rewards above {replay.success_threshold:g}; survives a restart"


def _success_weighting(config: RunConfig) -> str:
    grpo = config.learner.grpo
    if not grpo.use_success_buffer:
        return "not used"
    if grpo.importance_weighting == "off" or grpo.success_weighting == "one":
        return "ratio 1"
    return f"ratio from the stored logprobs, up to {grpo.importance_cap:g}"


def _learning_rate(config: RunConfig) -> str:
    grpo = config.learner.grpo
    warm = f", warm-up of {grpo.warmup_updates} updates" if grpo.warmup_updates else ""
    schedule = grpo.learning_rate_schedule
    end = "" if schedule == "constant" else f" to {grpo.min_learning_rate_ratio * grpo.learning_rate:g}"
    return f"{grpo.learning_rate:g}, {schedule}{end}{warm}"


def _optimizer(config: RunConfig) -> str:
    grpo = config.learner.grpo
    return f"AdamW, weight decay {grpo.weight_decay:g}, gradient norm {grpo.max_grad_norm:g}, skipped if not finite"


def _scheduling(config: RunConfig) -> str:
    if config.learner.grpo.max_staleness:
        return "asynchronous: no desktop waits for another" if config.replay.schedule == "asynchronous" else "lock-step"
    return "lock-step, then training" if config.replay.schedule == "lock_step" else "asynchronous within a batch"


def _staleness(config: RunConfig) -> str:
    limit = config.learner.grpo.max_staleness
    return f"at most {limit}" if limit else "0"


def _context(config: RunConfig) -> str:
    if config.agent.context == "episode":
        return f"all screenshots, up to {config.tasks.max_steps}"
    if config.agent.context == "segment":
        fewest, most = config.agent.segment_images
        return f"the last {fewest} to {most} screenshots"
    return f"the last {config.agent.window_images} screenshots"


_ROWS: Sequence[_Row] = (
    _Row("batch", "32 tasks x 8 = 256; steps of 8 tasks", "16 tasks x 8 = 128; 2 optimizer steps of 64", _batch,
         "learner.grpo.groups_per_batch, tasks.num_rollouts, learner.grpo.num_minibatches"),
    _Row("rollouts of an often solved task", "8", "8",
         lambda c: f"2 to {c.tasks.num_rollouts}" if c.learner.grpo.dynamic_rollouts else str(c.tasks.num_rollouts),
         "learner.grpo.dynamic_rollouts"),
    _Row("desktops", "256", "128", lambda c: str(c.desktop.num_envs), "desktop.num_envs"),
    _Row("steps per episode", "15", "15", lambda c: str(c.tasks.max_steps), "tasks.max_steps"),
    _Row("context", "all screenshots, up to 15", "all screenshots, up to 15", _context, "agent.context"),
    _Row("rollout temperature", "1.0", "1.0", lambda c: str(c.learner.grpo.temperature),
         "learner.grpo.temperature"),
    _Row("scheduling", "lock-step", "lock-step, then training", _scheduling,
         "replay.schedule, learner.grpo.max_staleness"),
    _Row("staleness", "0", "0", _staleness, "learner.grpo.max_staleness"),
    _Row("reward", "evaluator - 1 for a format error", "evaluator - 0.5 if the last action does not parse",
         _reward, "learner.grpo.format_penalty"),
    _Row("action that does not parse", "not stated", "ends the episode, the state is evaluated", _format_end,
         "agent.format_error"),
    _Row("evaluator error", "not stated", "reward 0", lambda c: "a fault: the episode is repeated, no reward"),
    _Row("advantage", "(r - mean) / std", "(r - mean) / (sample std + 1e-6)", _advantage, "learner.grpo.advantage"),
    _Row("zero-variance group", "not stated", "kept, advantage 0",
         lambda c: "kept, advantage 0" if c.learner.grpo.zero_variance_groups == "keep" else "dropped and replaced",
         "learner.grpo.zero_variance_groups"),
    _Row("clip", "-0.2 / +0.3", "-0.2 / +0.3, dual 3", _clip, "learner.grpo.clip_low, clip_high, dual_clip"),
    _Row("old logprobs", "of the sampling policy",
         "the policy before the update; no correction for the sampling policy", _proximal_policy,
         "learner.grpo.importance_weighting"),
    _Row("loss over tokens", "mean of the trajectories' token means",
         "mean of the trajectories' token means", _loss_reduction, "learner.grpo.loss_denominator"),
    _Row("trained tokens", "action tokens", "action tokens, decoded and re-encoded, with chat marks",
         lambda c: "exactly the sampled tokens"),
    _Row("KL, entropy bonus", "off", "off", _regularisation,
         "learner.grpo.kl_coefficient, kl_estimator, kl_applied_to, entropy_coefficient"),
    _Row("optimizer", "AdamW", "AdamW, weight decay 0.01, gradient norm 1, skipped if not finite", _optimizer,
         "learner.grpo.weight_decay, max_grad_norm"),
    _Row("learning rate", "1e-06, constant", "1e-06, constant", _learning_rate,
         "learner.grpo.learning_rate, learning_rate_schedule, warmup_updates"),
    _Row("success buffer: use", "all fail: a success replaces a random member",
         "std < 0.05 and mean < 0.2: a stored success replaces the first member", _replacement,
         "learner.grpo.use_success_buffer, replace_when, replace_slot"),
    _Row("success buffer: can be disabled", "yes", "no: its key is never read", lambda c: "yes",
         "learner.grpo.use_success_buffer"),
    _Row("success buffer: content", "successes", "8 per task, rewards above 0.1; lost at a restart", _success_buffer,
         "replay.successes_per_task, success_threshold"),
    _Row("success buffer: sampling", "one at random", "uniform", _success_sampling, "replay.success_sampling"),
    _Row("success buffer: weighting", "not stated", "ratio 1", _success_weighting, "learner.grpo.success_weighting"),
    _Row("trained weights", "all", "all",
         lambda c: f"LoRA of rank {c.learner.lora.rank}" if c.learner.has_lora else "all", "learner.lora.rank"),
    _Row("vision tower", "trained", "trained", lambda c: "frozen" if c.learner.has_frozen_vision else "trained",
         "learner.freeze_vision"),
)  # fmt: skip


def diff_from_arpo(config: RunConfig) -> list[ArpoDifference]:
    """Return the table for one run."""
    return [ArpoDifference(row.topic, row.paper, row.code, row.run(config), row.keys) for row in _ROWS]
