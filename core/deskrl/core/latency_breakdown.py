"""Latency breakdown of steps: names of the parts, and their percentiles over many steps, in milliseconds.

The latency of an act request consists of `image` (preparing prompt and screenshots), `queue`, `prefill` and `decode`,
as the replica reports them, and `transport`: the rest, which is network, serialisation and failed attempts.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

PARTS: Mapping[str, str] = {
    "reset": "desktop: reset",
    "setup": "desktop: task's setup",
    "act": "act, all of it",
    "image": "act: images",
    "queue": "act: queue",
    "prefill": "act: prefill",
    "decode": "act: decoding",
    "transport": "act: transport",
    "input": "desktop: input",
    "settle": "desktop: settling",
}
"""Titles of all parts, in the order of a step. Only the first step of an episode has `reset` and `setup`."""


def split_act_latency(
    act_ms: float, image_ms: float, queue_ms: float, prefill_ms: float, decode_ms: float
) -> dict[str, float]:
    """Return the latency of an act request by part."""
    at_replica = {"image": image_ms, "queue": queue_ms, "prefill": prefill_ms, "decode": decode_ms}
    # Replica and actor measure with different clocks, so that the rest may be slightly negative.
    return {"act": act_ms, **at_replica, "transport": max(0.0, act_ms - sum(at_replica.values()))}


def percentiles_by_part(steps: Iterable[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return {part: {"median": …, "p90": …}} over the steps that have the part."""
    seen: dict[str, list[float]] = {}
    for step in steps:
        for part, value_ms in step.items():
            seen.setdefault(part, []).append(value_ms)
    return {
        part: {"median": round(statistics.median(seen[part]), 1), "p90": round(_p90(seen[part]), 1)}
        for part in PARTS
        if part in seen
    }


def _p90(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]
