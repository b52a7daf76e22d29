"""What `deskrl top` shows: the dashboards' figures as lines of text. Knows the metrics' names; reads no port.

A figure that is not there yet is a dash, so that a role that does not answer takes nothing else with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deskrl.core.top.scrape import Gpu
from deskrl.core.top.window import Window

Row = tuple[str, str]
_PLAYING = ("setting_up", "waiting_for_model", "waiting_for_others", "acting", "evaluating")


@dataclass(frozen=True)
class Figures:
    """One panel: what is measured, and how much it is."""

    title: str
    rows: Sequence[Row]


def environments(window: Window) -> Figures:
    """How fast experience comes, and what holds it up."""
    states = window.total_by("deskrl_actor_desktops", "state")
    num_desktops = sum(states.values())
    return Figures(
        "env throughput",
        [
            ("actions a minute", _number(_per_minute(window.rate("deskrl_actor_env_steps_total")))),
            ("episodes a minute", _split(window.rate_by("deskrl_actor_episodes_total", "termination"), 60)),
            ("desktops", _counts(states)),
            ("in an episode", _share(sum(states.get(state, 0.0) for state in _PLAYING), num_desktops)),
            ("waiting for the model", _share(states.get("waiting_for_model", 0.0), num_desktops)),
            ("reset", _latency(window, "deskrl_actor_reset_seconds")),
            ("step", _latency(window, "deskrl_actor_step_seconds")),
            ("faults a minute", _split(window.rate_by("deskrl_actor_faults_total", "kind"), 60)),
            ("leases", _leases(window)),
        ],
    )


def inference(window: Window) -> Figures:
    """How fast actions come, and under which weights."""
    versions = window.values("deskrl_inference_policy_step")
    skew = (
        f"{min(versions):.0f}" + (f" to {max(versions):.0f}" if min(versions) < max(versions) else "")
        if versions
        else "-"
    )
    phases = ("pause", "load", "verify", "clear_caches", "resume", "canary")
    means = {phase: window.mean("deskrl_inference_weight_update_seconds", phase=phase) for phase in phases}
    stages = ("image", "queue", "prefill", "decode")
    parts = {stage: window.mean("deskrl_inference_act_stage_seconds", stage=stage) for stage in stages}
    parts["transport"] = window.mean("deskrl_actor_act_transport_seconds")
    return Figures(
        "inference and weights",
        [
            ("actions a second", _number(window.rate("deskrl_inference_acts_total", outcome="sampled"))),
            ("model latency", _latency(window, "deskrl_actor_act_seconds")),
            ("in the engine", _number(window.total("deskrl_inference_running_acts"))),
            ("queue", _latency(window, "deskrl_inference_act_stage_seconds", stage="queue")),
            ("an action takes", _split({name: mean for name, mean in parts.items() if mean}, 1000, " ms")),
            ("tokens a second", _number(window.rate("deskrl_inference_action_tokens_total"))),
            ("prompt tokens cached", _ratio(window, "cached_prompt_tokens", "prompt_tokens")),
            ("policy version", skew),
            ("weight update", _split({name: mean for name, mean in means.items() if mean}, 1000, " ms")),
        ],
    )


def learning(window: Window) -> Figures:
    """What the learner makes of it."""

    def last(name: str, form: str = ".3g") -> str:
        value = window.total(f"deskrl_learner_{name}")
        return "-" if value is None else format(value, form)

    phases = ("wait", "learn", "publish", "checkpoint")
    means = {phase: window.mean("deskrl_learner_phase_seconds", phase=phase) for phase in phases}
    return Figures(
        "learning",
        [
            ("updates", last("updates_total", ".0f")),
            ("success, reward", f"{last('success_ratio', '.0%')}, {last('reward_mean')}"),
            ("loss", last("loss", "+.4f")),
            ("entropy, clipped", f"{last('entropy_nats')} nats, {last('clip_ratio', '.1%')}"),
            (
                "mismatch, lag 0 and more",
                f"{last('mismatch_max_nats', '.1e')}, {last('lagged_difference_nats', '.1e')}",
            ),
            ("staleness", last("staleness_max_versions", ".0f")),
            ("dropped groups", _counts(window.total_by("deskrl_learner_dropped_groups_total", "cause"))),
            ("stored successes used", last("replayed_successes_total", ".0f")),
            ("an update takes", _split({name: mean for name, mean in means.items() if mean}, 1, " s")),
        ],
    )


def machine(window: Window, gpus: Sequence[Gpu], answering: Sequence[str], asked: Sequence[str]) -> Figures:
    """The processes, the disk and the GPUs."""
    silent = [address for address in asked if address not in answering]
    memory = sum(window.values("process_resident_memory_bytes"))
    busy = [f"{gpu.busy_share:.0%} {gpu.used_mib / 1024:.0f}/{gpu.total_mib / 1024:.0f} GiB" for gpu in gpus]
    return Figures(
        "machine",
        [
            (
                "processes",
                f"{len(answering)} of {len(asked)} answer" + (f"; silent: {', '.join(silent)}" if silent else ""),
            ),
            ("their memory", f"{memory / 1024**3:.1f} GiB" if memory else "-"),
            ("commit to disk", _latency(window, "deskrl_replay_commit_seconds")),
            ("screenshots", f"{_number(window.rate('deskrl_replay_image_bytes_total'), 1e-6)} MB a second"),
            ("GPUs", "; ".join(busy) or "-"),
        ],
    )


def _leases(window: Window) -> str:
    running = _number(window.total("deskrl_replay_active_leases"))
    streaming = _number(window.total("deskrl_replay_open_streams"))
    return f"{running} running, {streaming} streaming"


def _ratio(window: Window, part: str, whole: str) -> str:
    of_part, of_whole = (window.increase(f"deskrl_inference_{name}_total") for name in (part, whole))
    return "-" if of_part is None or not of_whole else f"{of_part / of_whole:.0%}"


def _latency(window: Window, name: str, **labels: str) -> str:
    median, tail = window.quantile(0.5, name, **labels), window.quantile(0.99, name, **labels)
    return "-" if median is None or tail is None else f"p50 {_seconds(median)}, p99 {_seconds(tail)}"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def _per_minute(rate: float | None) -> float | None:
    return None if rate is None else rate * 60


def _number(value: float | None, factor: float = 1.0) -> str:
    return "-" if value is None else f"{value * factor:.1f}".removesuffix(".0")


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _split(values: Mapping[str, float], factor: float, unit: str = "") -> str:
    parts = [f"{name.replace('_', ' ')} {_number(value, factor)}{unit}" for name, value in values.items()]
    return ", ".join(parts) or "-"


def _counts(values: Mapping[str, float]) -> str:
    return _split({name: value for name, value in values.items() if value}, 1)
