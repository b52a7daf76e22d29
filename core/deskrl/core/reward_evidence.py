"""Values of reward terms in the evidence that is stored with an episode."""

from __future__ import annotations

import json


def reward_terms(evidence_json: str) -> dict[str, float]:
    """Return the value of each term of an episode's reward by name.

    Empty if the reward has only the task's own evaluator, or if the episode was not evaluated.

    Args:
        evidence_json: evidence of the episode's result; that of an evaluation after a format error is nested.
    """
    try:
        evidence = json.loads(evidence_json)
    except (ValueError, RecursionError):
        return {}
    for source in (evidence, evidence.get("evaluation")) if isinstance(evidence, dict) else ():
        terms = source.get("terms") if isinstance(source, dict) else None
        if isinstance(terms, dict):
            return {str(name): float(value) for name, value in terms.items() if isinstance(value, int | float)}
    return {}
