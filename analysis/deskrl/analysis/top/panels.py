"""Panels of `deskrl top`: metrics of the roles as lines of text. A value that is not available is shown as a dash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deskrl.analysis.top.scrape import Gpu
from deskrl.analysis.top.timeseries import ScrapeWindow

Row = tuple[str, str]
_IN_EPISODE = ("setting_up", "waiting_for_model", "waiting_for_others", "acting", "evaluating")


@dataclass(frozen=True)
class MetricPanel:
    """A panel with its rows: names and formatted values."""

    title: str
    rows: Sequence[Row]


def environments(window: ScrapeWindow) -> MetricPanel:
    """Return the throughput of the desktops and its bottlenecks."""
    states = window.total_by("deskrl_actor_desktops", "state")
    num_desktops = sum(states.values())
    return MetricPanel(
        "environment throughput",
        [
            ("actions per minute", _number(_per_minute(window.rate("deskrl_actor_env_steps_total")))),
            ("episodes per minute", _split(window.rate_by("deskrl_actor_episodes_total", "termination"), 60)),
            ("desktops", _counts(states)),
            ("in an episode", _share(sum(states.get(state, 0.0) for state in _IN_EPISODE), num_desktops)),
            ("waiting for the model", _share(states.get("waiting_for_model", 0.0), num_desktops)),
            ("reset latency", _latency(window, "deskrl_actor_reset_seconds")),
            ("step latency", _latency(window, "deskrl_actor_step_seconds")),
            ("faults per minute", _split(window.rate_by("deskrl_actor_faults_total", "kind"), 60)),
            ("leases", _leases(window)),
        ],
    )


def inference(window: ScrapeWindow) -> MetricPanel:
    """Return the throughput and latency of the replicas, and their policy versions."""
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
    return MetricPanel(
        "inference and weights",
        [
            ("actions per second", _number(window.rate("deskrl_inference_acts_total", outcome="sampled"))),
            ("model latency", _latency(window, "deskrl_actor_act_seconds")),
            ("running actions", _number(window.total("deskrl_inference_running_acts"))),
            ("queue latency", _latency(window, "deskrl_inference_act_stage_seconds", stage="queue")),
            ("action time", _split({name: mean for name, mean in parts.items() if mean}, 1000, " ms")),
            ("tokens per second", _number(window.rate("deskrl_inference_action_tokens_total"))),
            ("prefix cache hits", _ratio(window, "cached_prompt_tokens", "prompt_tokens")),
            ("policy version", skew),
            ("weight update time", _split({name: mean for name, mean in means.items() if mean}, 1000, " ms")),
        ],
    )


def training(window: ScrapeWindow) -> MetricPanel:
    """Return the metrics of the learner."""

    def last(name: str, form: str = ".3g") -> str:
        value = window.total(f"deskrl_learner_{name}")
        return "-" if value is None else format(value, form)

    phases = ("wait", "learn", "publish", "checkpoint")
    means = {phase: window.mean("deskrl_learner_phase_seconds", phase=phase) for phase in phases}
    return MetricPanel(
        "training",
        [
            ("updates", last("updates_total", ".0f")),
            ("success rate, reward", f"{last('success_ratio', '.0%')}, {last('reward_mean')}"),
            ("loss", last("loss", "+.4f")),
            ("entropy, clipped", f"{last('entropy_nats')} nats, {last('clip_ratio', '.1%')}"),
            *([("KL from the reference", f"{last('kl_nats')} nats")] if window.total("deskrl_learner_kl_nats") else []),
            (
                "mismatch at lag 0, lag > 0",
                f"{last('mismatch_max_nats', '.1e')}, {last('lagged_difference_nats', '.1e')}",
            ),
            ("staleness", last("staleness_max_versions", ".0f")),
            ("dropped groups", _counts(window.total_by("deskrl_learner_dropped_groups_total", "cause"))),
            ("success buffer used", last("replayed_successes_total", ".0f")),
            ("update time", _split({name: mean for name, mean in means.items() if mean}, 1, " s")),
        ],
    )


def machine(
    window: ScrapeWindow, gpus: Sequence[Gpu], reachable: Sequence[str], addresses: Sequence[str]
) -> MetricPanel:
    """Return the state of processes, disk and GPUs."""
    unreachable = [address for address in addresses if address not in reachable]
    memory = sum(window.values("process_resident_memory_bytes"))
    gpu_texts = [f"{gpu.utilisation:.0%} {gpu.used_mib / 1024:.0f}/{gpu.total_mib / 1024:.0f} GiB" for gpu in gpus]
    return MetricPanel(
        "machine",
        [
            (
                "processes",
                f"{len(reachable)} of {len(addresses)} reachable"
                + (f"; unreachable: {', '.join(unreachable)}" if unreachable else ""),
            ),
            ("memory", f"{memory / 1024**3:.1f} GiB" if memory else "-"),
            ("commit latency", _latency(window, "deskrl_replay_commit_seconds")),
            ("screenshots", f"{_number(window.rate('deskrl_replay_image_bytes_total'), 1e-6)} MB/s"),
            ("GPUs", "; ".join(gpu_texts) or "-"),
        ],
    )


def _leases(window: ScrapeWindow) -> str:
    running = _number(window.total("deskrl_replay_active_leases"))
    streaming = _number(window.total("deskrl_replay_open_streams"))
    return f"{running} running, {streaming} streaming"


def _ratio(window: ScrapeWindow, part: str, whole: str) -> str:
    num_part, num_whole = (window.increase(f"deskrl_inference_{name}_total") for name in (part, whole))
    return "-" if num_part is None or not num_whole else f"{num_part / num_whole:.0%}"


def _latency(window: ScrapeWindow, name: str, **labels: str) -> str:
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
