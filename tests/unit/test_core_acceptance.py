"""A run is judged by its records: a missing record is a criterion that is not met."""

from typing import Any

import pytest

from deskrl.core.config import RunConfig
from deskrl.core.running.acceptance import Criterion, Expected, RunFacts, expected_of, judge

PROOF = {"num_tokens": 64, "mean_difference": 1e-6, "max_difference": 1e-5}
CLEAN = RunFacts(num_restarts=0, leftovers=(), checkpoint=PROOF)
EXPECTED = Expected(eval_episodes=96, min_gain=0.3, replay=True, max_mismatch=1e-3)
NOTHING_ASKED = Expected(eval_episodes=0, min_gain=None, replay=False, max_mismatch=1e-3)


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


def rows(metrics: list[dict[str, Any]], facts: RunFacts = CLEAN, expected: Expected = EXPECTED) -> dict[str, Criterion]:
    return {row.criterion: row for row in judge(metrics, facts, expected)}


def verdicts(
    metrics: list[dict[str, Any]], facts: RunFacts = CLEAN, expected: Expected = EXPECTED
) -> dict[str, bool | None]:
    return {name: row.ok for name, row in rows(metrics, facts, expected).items()}


def test_a_good_run_meets_every_criterion() -> None:
    assert all(verdicts(good_run()).values())


def test_the_gain_is_told_with_its_interval() -> None:
    row = rows(good_run())["it learns"]
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
    found = rows(good_run(), facts)
    assert not found["it finishes"].ok and "2 restarts" in found["it finishes"].value
    assert not found["nothing is left"].ok and found["nothing is left"].value == "process 7 Xvfb"


def test_what_is_not_asked_for_is_told_and_not_judged() -> None:
    metrics = [line for line in good_run() if line["kind"] != "eval"]
    facts = RunFacts(num_restarts=0, leftovers=(), checkpoint=None)
    found = rows(metrics, facts, NOTHING_ASKED)
    not_judged = ["it learns", "no task gets worse", "replay is at work", "the checkpoint is valid"]
    assert [name for name, row in found.items() if row.ok is None] == not_judged
    assert all(found[name].value.startswith("not asked for: learner.") for name in not_judged)
    assert all(row.ok for name, row in found.items() if name not in not_judged)


def test_a_gain_that_nobody_asked_for_is_told_and_not_judged() -> None:
    expected = Expected(eval_episodes=96, min_gain=None, replay=True, max_mismatch=1e-3)
    row = rows(good_run(), expected=expected)["it learns"]
    assert row.ok is None and row.value.startswith("33/96 -> 86/96")


def test_fewer_bits_are_allowed_a_larger_difference() -> None:
    def allowed(learner: str, inference: str) -> float:
        config = RunConfig.model_validate(
            {"name": "r", "learner": {"dtype": learner}, "inference": {"dtype": inference}}
        )
        return expected_of(config).max_mismatch

    assert allowed("float32", "float32") == 1e-3
    assert allowed("bfloat16", "bfloat16") == allowed("float32", "bfloat16") == 3e-2
