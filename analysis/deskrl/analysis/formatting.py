"""Text forms of durations, shares, dates and enumeration names for reports, the viewer and the status command."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any


def format_duration(seconds: float) -> str:
    """Format a duration as 4.2 s, 48 s, 9 min 12 s or 3 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f}\N{NO-BREAK SPACE}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}\N{NO-BREAK SPACE}s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_age(unix_s: float | None) -> str:
    """Format the time since a Unix time as "5 min ago"; empty for None."""
    if unix_s is None:
        return ""
    age_s = max(0.0, time.time() - unix_s)
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if age_s >= length_s:
            return f"{age_s / length_s:.0f} {unit} ago"
    return f"{age_s:.0f} s ago"


def format_points(points: float) -> str:
    """Format percentage points as a signed whole number."""
    whole = round(points)
    return f"{whole:+d}".replace("-", "−") if whole else "0"


def format_percent(share: float | None) -> str:
    """Format a share as a whole percentage; a dash for None."""
    return "–" if share is None else f"{share:.0%}"


def format_date(unix_s: float) -> str:
    """Format a Unix time as date and time in UTC."""
    return time.strftime("%-d %B %Y, %H:%M UTC", time.gmtime(unix_s))


def enum_words(name: str, prefix: str) -> str:
    """Return the name of an enumeration value without its prefix, in lower-case words."""
    return name.removeprefix(prefix).lower().replace("_", " ")


def format_size(num_bytes: int) -> str:
    """Format a number of bytes as 12.3 MiB or 3.4 GiB."""
    return f"{num_bytes / 1024**3:.1f} GiB" if num_bytes >= 1024**3 / 10 else f"{num_bytes / 1024**2:.1f} MiB"


def format_evidence(evidence_json: str) -> str:
    """Format an evaluator's evidence for people: one line per key, and text without JSON's quotes and escapes.

    Text that is not JSON, such as that of a truncated record, is returned unchanged.
    """
    value = _parse_json(evidence_json)
    if value is None:
        return evidence_json
    if not isinstance(value, dict):
        return _readable(value)
    return "\n".join(f"{key.replace('_', ' ')}: {_readable(item)}" for key, item in _with_named_terms(value).items())


def _with_named_terms(evidence: dict[str, Any]) -> dict[str, Any]:
    """Return evidence with the terms of the reward as text: "task 1, brevity 0.5"."""
    terms = evidence.get("terms")
    if not isinstance(terms, dict) or not all(isinstance(value, int | float) for value in terms.values()):
        return evidence
    text = ", ".join(f"{name} {value:.3g}" for name, value in terms.items())
    return {"reward terms": text, **{key: value for key, value in evidence.items() if key != "terms"}}


def _readable(value: Any) -> str:
    """Return text as it is, JSON inside text as JSON, and other values as JSON without escapes."""
    if isinstance(value, str):
        inner = _parse_json(value) if value.lstrip().startswith(("{", "[")) else None
        return value if inner is None else _readable(inner)
    return json.dumps(value, ensure_ascii=False)


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def sorted_counts(counts: Mapping[str, int], prefix: str = "") -> list[tuple[str, int]]:
    """Return (name in words, count) for every count that is not 0, largest first."""
    named = ((enum_words(name, prefix), num) for name, num in counts.items() if num)
    return sorted(named, key=lambda it: (-it[1], it[0]))
