"""Where the paper, ARPO's code and a run differ, as a table. Pure: knows the configuration and three columns.

The paper is arXiv:2505.16282, its code github.com/dvlab-research/ARPO at 7489ae3 with `examples/osworld_full_arpo.sh`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deskrl.core.config import RunConfig

_PLACES = {"first": "the first member", "random": "a random member", "oldest": "the oldest member"}


@dataclass(frozen=True)
class Difference:
    """One row."""

    topic: str
    paper: str
    code: str
    run: str
    keys: str
    """Where the run says so; empty for what is not an option."""


@dataclass(frozen=True)
class _Row:
    topic: str
    paper: str
    code: str
    run: Callable[[RunConfig], str]
    keys: str = ""


def _batch(config: RunConfig) -> str:
    grpo = config.learner.grpo
    tasks, rollouts = grpo.groups_per_batch, config.tasks.rollouts
    step = tasks * rollouts / grpo.minibatches
    steps = "step" if grpo.minibatches == 1 else "steps"
    return f"{tasks} tasks x {rollouts} = {tasks * rollouts}; {grpo.minibatches} optimizer {steps} of {step:g}"


def _reward(config: RunConfig) -> str:
    penalty = config.learner.grpo.format_penalty
    return f"evaluator - {penalty:g} if the last action does not parse" if penalty else "evaluator alone"


def _format_end(config: RunConfig) -> str:
    if config.agent.format_error == "evaluate":
        return "ends the episode, the state is evaluated"
    return "ends the episode with evaluator reward 0"


def _advantage(config: RunConfig) -> str:
    grpo = config.learner.grpo
    told = "r - mean" if grpo.advantage == "centred" else "(r - mean) / (sample std + 1e-6)"
    return told if grpo.negative_scale == 1 else f"{told}, negative ones x {grpo.negative_scale:g}"


def _clip(config: RunConfig) -> str:
    grpo = config.learner.grpo
    dual = f", dual {grpo.dual_clip:g}" if grpo.dual_clip else ""
    return f"-{grpo.clip_low:g} / +{grpo.clip_high:g}{dual}"


def _old(config: RunConfig) -> str:
    grpo = config.learner.grpo
    if grpo.importance == "off":
        return "the policy before the update; no correction for who sampled"
    return f"the policy before the update, times pi_prox / pi_behaviour up to {grpo.importance_cap:g}"


def _denominator(config: RunConfig) -> str:
    grpo = config.learner.grpo
    if grpo.loss_denominator == "trajectory_tokens":
        return "mean of the trajectories' token means"
    return f"sum over tokens / ({grpo.loss_scale_tokens} x trajectories)"


def _replay(config: RunConfig) -> str:
    if not config.learner.grpo.replay_successes:
        return "off"
    rule = (
        f"no reward above {config.replay.success_above:g}"
        if config.learner.grpo.replay_when == "all_failed"
        else "std < 0.05 and mean < 0.2"
    )
    return f"{rule}: a stored success replaces {_PLACES[config.learner.grpo.replay_place]}"


def _choice(config: RunConfig) -> str:
    if not config.learner.grpo.replay_successes:
        return "none is used"
    return "uniform" if config.replay.success_choice == "uniform" else "the newest"


def _stored(config: RunConfig) -> str:
    if not config.learner.grpo.replay_successes:
        return "nothing"
    return (
        f"{config.replay.successes_per_task} a task, rewards above {config.replay.success_above:g}; survives a restart"
    )


def _replay_weight(config: RunConfig) -> str:
    grpo = config.learner.grpo
    if not grpo.replay_successes:
        return "none is used"
    if grpo.importance == "off" or grpo.success_ratio == "one":
        return "ratio 1"
    return f"its stored logprobs, up to {grpo.importance_cap:g}"


def _rate(config: RunConfig) -> str:
    grpo = config.learner.grpo
    warm = f", warm-up of {grpo.warmup_updates} updates" if grpo.warmup_updates else ""
    return f"{grpo.learning_rate:g}, constant{warm}"


def _optimizer(config: RunConfig) -> str:
    grpo = config.learner.grpo
    return f"AdamW, weight decay {grpo.weight_decay:g}, gradient norm {grpo.max_grad_norm:g}, skipped if not finite"


def _scheduling(config: RunConfig) -> str:
    if config.learner.grpo.max_staleness:
        return "each desktop goes on by itself" if config.replay.schedule == "free" else "turn by turn"
    return "turn by turn, then learning" if config.replay.schedule == "lock_step" else "free within a batch"


def _staleness(config: RunConfig) -> str:
    limit = config.learner.grpo.max_staleness
    return f"at most {limit}" if limit else "0"


def _context(config: RunConfig) -> str:
    if config.agent.context == "episode":
        return f"all screenshots, up to {config.tasks.max_steps}"
    return f"the last {config.agent.window_images} screenshots"


_ROWS: Sequence[_Row] = (
    _Row("batch", "32 tasks x 8 = 256; steps of 8 tasks", "16 tasks x 8 = 128; 2 optimizer steps of 64", _batch,
         "learner.grpo.groups_per_batch, tasks.rollouts, learner.grpo.minibatches"),
    _Row("rollouts of a task that is often solved", "8", "8",
         lambda c: f"2 to {c.tasks.rollouts}" if c.learner.grpo.dynamic_rollouts else str(c.tasks.rollouts),
         "learner.grpo.dynamic_rollouts"),
    _Row("desktops", "256", "128", lambda c: str(c.desktop.num_envs), "desktop.num_envs"),
    _Row("steps of an episode", "15", "15", lambda c: str(c.tasks.max_steps), "tasks.max_steps"),
    _Row("context", "all screenshots, up to 15", "all screenshots, up to 15", _context, "agent.context"),
    _Row("rollout temperature", "1.0", "1.0", lambda c: str(c.learner.grpo.temperature),
         "learner.grpo.temperature"),
    _Row("scheduling", "lock-step", "turn by turn, then learning", _scheduling,
         "replay.schedule, learner.grpo.max_staleness"),
    _Row("staleness", "0", "0", _staleness, "learner.grpo.max_staleness"),
    _Row("reward", "evaluator - 1 if the format is wrong", "evaluator - 0.5 if the last action does not parse",
         _reward, "learner.grpo.format_penalty"),
    _Row("an action that does not parse", "not told", "ends the episode, the state is evaluated", _format_end,
         "agent.format_error"),
    _Row("evaluator that raises", "not told", "reward 0", lambda c: "a fault: played again, never a reward"),
    _Row("advantage", "(r - mean) / std", "(r - mean) / (sample std + 1e-6)", _advantage, "learner.grpo.advantage"),
    _Row("group without spread", "not told", "kept, advantage 0",
         lambda c: "kept, advantage 0" if c.learner.grpo.groups_without_spread == "keep" else "dropped and replaced",
         "learner.grpo.groups_without_spread"),
    _Row("clip", "-0.2 / +0.3", "-0.2 / +0.3, dual 3", _clip, "learner.grpo.clip_low, clip_high, dual_clip"),
    _Row("old logprobs", "of the sampling policy", "the policy before the update; no correction for who sampled", _old,
         "learner.grpo.importance"),
    _Row("loss over tokens", "mean of the trajectories' token means",
         "mean of the trajectories' token means", _denominator, "learner.grpo.loss_denominator"),
    _Row("tokens learnt from", "of the actions", "of the actions, decoded and encoded again, with turn marks",
         lambda c: "exactly those that were sampled"),
    _Row("KL, entropy bonus", "off", "off", lambda c: "off"),
    _Row("optimizer", "AdamW", "AdamW, weight decay 0.01, gradient norm 1, skipped if not finite", _optimizer,
         "learner.grpo.weight_decay, max_grad_norm"),
    _Row("learning rate", "1e-06, constant", "1e-06, constant", _rate, "learner.grpo.learning_rate, warmup_updates"),
    _Row("replay: when", "all fail: a success replaces a random member",
         "std < 0.05 and mean < 0.2: a stored success replaces the first member", _replay,
         "learner.grpo.replay_successes, replay_when, replay_place"),
    _Row("replay: can be off", "yes", "no: its key is read nowhere", lambda c: "yes",
         "learner.grpo.replay_successes"),
    _Row("replay: what is stored", "successes", "8 a task, rewards above 0.1; lost at a restart", _stored,
         "replay.successes_per_task, success_above"),
    _Row("replay: which", "one at random", "uniform", _choice, "replay.success_choice"),
    _Row("replay: weight", "not told", "ratio 1", _replay_weight, "learner.grpo.success_ratio"),
    _Row("vision tower", "trained", "trained", lambda c: "frozen" if c.learner.freeze_vision else "trained",
         "learner.freeze_vision"),
)  # fmt: skip


def differences(config: RunConfig) -> list[Difference]:
    """The table for one run."""
    return [Difference(row.topic, row.paper, row.code, row.run(config), row.keys) for row in _ROWS]
