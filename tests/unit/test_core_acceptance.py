"""A run is judged by its records: a missing record is a criterion that is not met."""

from typing import Any

import pytest

from deskrl.core.running.acceptance import RunFacts, judge

PROOF = {"num_tokens": 64, "mean_difference": 1e-6, "max_difference": 1e-5}
CLEAN = RunFacts(num_restarts=0, leftovers=(), checkpoint=PROOF)


def evaluation(when: str, successes: dict[str, int]) -> dict[str, Any]:
    per_task = {task: {"n": 24, "success": success} for task, success in successes.items()}
    return {
        "kind": "eval",
        "when": when,
        "episodes": 24 * len(successes),
        "successes": sum(successes.values()),
        "per_task": per_task,
    }


def good_run() -> list[dict[str, Any]]:
    updates = [
        {
            "kind": "update",
            "update": n,
            "loss": -0.01 * n,
            "mismatch_mean": 1e-6,
            "mismatch_max": 1e-5,
            "replayed": n % 2,
        }
        for n in (1, 2, 3)
    ]
    weights = [{"kind": "weights", "ok": True, "canary_max_difference": 1e-6} for _ in range(4)]
    return [
        evaluation("before", {"a": 8, "b": 10, "c": 6, "d": 9}),
        *updates,
        *weights,
        evaluation("after", {"a": 20, "b": 22, "c": 21, "d": 23}),
        {"kind": "replay", "stored": {"a": 8, "b": 3}},
        {"kind": "phase", "phase": "finished"},
    ]


def verdicts(metrics: list[dict[str, Any]], facts: RunFacts = CLEAN) -> dict[str, bool]:
    return {criterion.criterion: criterion.ok for criterion in judge(metrics, facts)}


def test_a_good_run_meets_every_criterion() -> None:
    assert all(verdicts(good_run()).values())


def test_the_gain_is_told_with_its_interval() -> None:
    row = next(row for row in judge(good_run(), CLEAN) if row.criterion == "it learns")
    assert row.value.startswith("33/96 -> 86/96: +55 points [+")


def test_no_record_meets_no_criterion() -> None:
    facts = RunFacts(num_restarts=1, leftovers=("process 7 Xvfb",), checkpoint={"error": "no checkpoint"})
    assert not any(verdicts([], facts).values())


@pytest.mark.parametrize(
    ("change", "criterion"),
    [
        ({"kind": "eval", "when": "after", "episodes": 96, "successes": 60}, "it learns"),
        ({"kind": "eval", "when": "after", "episodes": 48, "successes": 48}, "it learns"),
        ({"kind": "update", "loss": float("nan")}, "loss is finite and changes"),
        ({"kind": "update", "mismatch_mean": 0.1}, "the weights that act are those learnt"),
        ({"kind": "weights", "ok": False}, "every replica confirmed each update"),
        ({"kind": "update", "replayed": 0}, "replay is at work"),
    ],
)
def test_each_criterion_can_fail_by_itself(change: dict[str, Any], criterion: str) -> None:
    keys = [key for key in ("kind", "when") if key in change]
    metrics = [line | change if all(line.get(key) == change[key] for key in keys) else line for line in good_run()]
    assert [name for name, ok in verdicts(metrics).items() if not ok] == [criterion]


def test_a_task_that_got_worse_is_seen_even_when_the_mean_rose() -> None:
    metrics = [*good_run(), evaluation("after", {"a": 7, "b": 24, "c": 24, "d": 24})]
    assert [name for name, ok in verdicts(metrics).items() if not ok] == ["no task gets worse"]


def test_restarts_and_leftovers_are_named() -> None:
    facts = RunFacts(num_restarts=2, leftovers=("process 7 Xvfb",), checkpoint=PROOF)
    rows = {row.criterion: row for row in judge(good_run(), facts)}
    assert not rows["it finishes"].ok and "2 restarts" in rows["it finishes"].value
    assert not rows["nothing is left"].ok and rows["nothing is left"].value == "process 7 Xvfb"
