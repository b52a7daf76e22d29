"""Where the time of a policy's turns went, by part, in milliseconds: names, and what is told of many turns. Pure.

An act's round trip is `image` (prompt and screenshots made ready), `queue`, `prefill` and `decode` as its replica tells
them, and `transport`: the rest, which is the wire, its coding, and replicas that were asked in vain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from deskrl.core.stats import quantile

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
"""All parts, in the order of a turn, with their titles. Reset and setup are the first turn's."""


def split_act(act_ms: float, image_ms: float, queue_ms: float, prefill_ms: float, decode_ms: float) -> dict[str, float]:
    """An act's round trip by part."""
    at_replica = {"image": image_ms, "queue": queue_ms, "prefill": prefill_ms, "decode": decode_ms}
    # The replica's clock and the actor's are read by different machines: what is left may come out just below zero.
    return {"act": act_ms, **at_replica, "transport": max(0.0, act_ms - sum(at_replica.values()))}


def spread_by_part(turns: Iterable[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Median and 90th percentile of each part over the turns that have it: {part: {"median": …, "p90": …}}."""
    seen: dict[str, list[float]] = {}
    for turn in turns:
        for part, value_ms in turn.items():
            seen.setdefault(part, []).append(value_ms)
    return {
        part: {"median": round(quantile(seen[part], 0.5), 1), "p90": round(quantile(seen[part], 0.9), 1)}
        for part in PARTS
        if part in seen
    }
