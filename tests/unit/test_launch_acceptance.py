"""Acceptance criteria of a finished run, judged from its records; a missing record fails its criterion."""

from dataclasses import replace
from typing import Any

import pytest

from deskrl.core.config import RunConfig
from deskrl.launch.acceptance import Criterion, Expected, RunFacts, expected_of, judge

PROOF = {"num_tokens": 64, "mean_difference": 1e-6, "max_difference": 1e-5}
CLEAN = RunFacts(num_restarts=0, leftovers=(), checkpoint=PROOF)
EXPECTED = Expected(
    eval_episodes=96,
    min_gain=0.3,
    success_buffer=True,
    replace_when="all_failed",
    success_threshold=0.1,
    max_mismatch=1e-3,
    num_updates=3,
)
ALL_DISABLED = replace(EXPECTED, eval_episodes=0, min_gain=None, success_buffer=False)


def evaluation(when: str, successes: dict[str, int]) -> dict[str, Any]:
    per_task = {task: {"n": 24, "success": success} for task, success in successes.items()}
    return {
        "kind": "eval",
        "when": when,
        "episodes": 24 * len(successes),
        "successes": sum(successes.values()),
        "per_task": per_task,
    }


def group(
    task_id: str, rewards: list[float], used_candidate: bool = False, dropped_because: str = ""
) -> dict[str, Any]:
    return {
        "task_id": task_id,
        "rewards": rewards,
        "used_candidate": used_candidate,
        "dropped_because": dropped_because,
    }


SOLVED, FAILED = group("a", [1.0, 0.0]), group("a", [0.0, 0.0], dropped_because="all_failed")
RESCUED = group("a", [0.0, 0.0], used_candidate=True)


def updates_of(*groups: dict[str, Any]) -> list[dict[str, Any]]:
    """A good run in which update n has the n-th of these groups."""
    lines = [line for line in good_run() if line["kind"] != "update"]
    template = next(line for line in good_run() if line["kind"] == "update")
    updates = [template | {"update": n, "loss": -0.01 * n, "groups": [it]} for n, it in enumerate(groups, 1)]
    return [*updates, *lines]


def good_run() -> list[dict[str, Any]]:
    updates = [
        {
            "kind": "update",
            "update": n,
            "loss": -0.01 * n,
            "mismatch_mean": 1e-6,
            "mismatch_max": 1e-5,
            "groups": [it],
        }
        for n, it in ((1, SOLVED), (2, RESCUED), (3, SOLVED))
    ]
    weights = [{"kind": "weights", "ok": True, "canary_max_difference": 1e-6} for _ in range(4)]
    return [
        evaluation("before", {"a": 8, "b": 10, "c": 6, "d": 9}),
        *updates,
        *weights,
        evaluation("after", {"a": 20, "b": 22, "c": 21, "d": 23}),
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


def test_the_gain_is_reported_with_its_confidence_interval() -> None:
    row = rows(good_run())["success rate rises"]
    assert row.value.startswith("33/96 -> 86/96: +55 points [+")


def test_without_records_no_criterion_is_met() -> None:
    facts = RunFacts(num_restarts=1, leftovers=("process 7 Xvfb",), checkpoint={"error": "no checkpoint"})
    assert not any(verdicts([], facts).values())


@pytest.mark.parametrize(
    ("change", "criterion"),
    [
        ({"kind": "eval", "when": "after", "episodes": 96, "successes": 60}, "success rate rises"),
        ({"kind": "eval", "when": "after", "episodes": 48, "successes": 48}, "success rate rises"),
        ({"kind": "update", "loss": float("nan")}, "the loss is finite and changes"),
        ({"kind": "update", "mismatch_mean": 0.1}, "behaviour policy and learner agree"),
        ({"kind": "weights", "ok": False}, "every replica confirmed every weight update"),
        ({"kind": "update", "update": 2, "groups": [FAILED]}, "the success buffer is used"),
    ],
)
def test_each_criterion_can_fail_by_itself(change: dict[str, Any], criterion: str) -> None:
    keys = [key for key in ("kind", "when", "update") if key in change]
    metrics = [line | change if all(line.get(key) == change[key] for key in keys) else line for line in good_run()]
    assert [name for name, ok in verdicts(metrics).items() if not ok] == [criterion]


def test_a_run_that_ends_after_its_warm_start_is_not_judged_by_updates() -> None:
    metrics = [{"kind": "weights", "ok": True, "canary_max_difference": 1e-6}, {"kind": "phase", "phase": "finished"}]
    found = verdicts(metrics, expected=replace(ALL_DISABLED, num_updates=0))
    assert found["the loss is finite and changes"] is None
    assert found["behaviour policy and learner agree"] is None
    assert found["every replica confirmed every weight update"]
    assert False not in found.values()


def test_a_task_that_got_worse_fails_the_run_even_if_the_mean_rose() -> None:
    metrics = [*good_run(), evaluation("after", {"a": 1, "b": 24, "c": 24, "d": 24})]
    found = verdicts(metrics, expected=replace(EXPECTED, min_gain=0.2))
    assert [name for name, ok in found.items() if not ok] == ["no task gets worse"]


def test_a_task_that_was_not_evaluated_afterwards_fails_the_run() -> None:
    metrics = [*good_run(), evaluation("after", {"b": 24, "c": 24, "d": 24, "e": 24})]
    assert [name for name, ok in verdicts(metrics).items() if not ok] == ["no task gets worse"]


@pytest.mark.parametrize(
    ("after", "min_gain", "rises"),
    [
        (47, 0.0, True),  # 33/96 -> 47/96: +15 points [+1, +28]
        (46, 0.0, False),  # +14 points [0, +27]
        (60, 0.1, True),  # +28 points [+14, +41]
        (60, 0.2, False),  # the gain is above 20 points, its interval is not
    ],
)
def test_a_gain_is_judged_by_its_confidence_interval(after: int, min_gain: float, rises: bool) -> None:
    metrics = [*good_run(), {**evaluation("after", {"a": 20, "b": 22, "c": 21, "d": 23}), "successes": after}]
    assert verdicts(metrics, expected=replace(EXPECTED, min_gain=min_gain))["success rate rises"] is rises


def test_a_task_whose_success_may_have_fallen_by_chance_does_not_fail_the_run() -> None:
    metrics = [*good_run(), evaluation("after", {"a": 7, "b": 24, "c": 24, "d": 24})]
    assert verdicts(metrics)["no task gets worse"]


def test_restarts_and_leftovers_are_named() -> None:
    facts = RunFacts(num_restarts=2, leftovers=("process 7 Xvfb",), checkpoint=PROOF)
    found = rows(good_run(), facts)
    assert not found["the run finishes"].ok and "2 restarts" in found["the run finishes"].value
    assert not found["nothing is left behind"].ok and found["nothing is left behind"].value == "process 7 Xvfb"


def test_disabled_criteria_are_listed_but_not_judged() -> None:
    metrics = [line for line in good_run() if line["kind"] != "eval"]
    facts = RunFacts(num_restarts=0, leftovers=(), checkpoint=None)
    found = rows(metrics, facts, ALL_DISABLED)
    not_judged = ["success rate rises", "no task gets worse", "the success buffer is used", "the checkpoint is valid"]
    assert [name for name, row in found.items() if row.ok is None] == not_judged
    assert all(found[name].value.startswith("disabled by learner.") for name in not_judged)
    assert all(row.ok for name, row in found.items() if name not in not_judged)


def test_without_a_minimum_the_gain_is_reported_but_not_judged() -> None:
    row = rows(good_run(), expected=replace(EXPECTED, min_gain=None))["success rate rises"]
    assert row.ok is None and row.value.startswith("33/96 -> 86/96")


def test_16_bit_dtypes_allow_a_larger_logprob_difference() -> None:
    def allowed(learner: str, inference: str) -> float:
        config = RunConfig.model_validate(
            {"name": "r", "learner": {"dtype": learner}, "inference": {"dtype": inference}}
        )
        return expected_of(config).max_mismatch

    assert allowed("float32", "float32") == 1e-3
    assert allowed("bfloat16", "bfloat16") == allowed("float32", "bfloat16") == 3e-2


@pytest.mark.parametrize(
    ("groups", "ok", "value"),
    [
        ((SOLVED, RESCUED, SOLVED), True, "used 1 times, never withheld"),
        ((SOLVED, FAILED, RESCUED), False, "used 1 times, withheld 1 times (a)"),
        ((SOLVED, SOLVED, SOLVED), None, "not exercised"),
        ((FAILED, SOLVED, SOLVED), None, "not exercised"),  # nothing was stored yet
        ((group("b", [1.0, 0.0]), FAILED, SOLVED), None, "not exercised"),  # a success of another task
        ((group("a", [0.1, 0.0]), FAILED, SOLVED), None, "not exercised"),  # 0.1 does not exceed the threshold
        ((SOLVED, group("a", [0.0], dropped_because="faults"), SOLVED), None, "not exercised"),
        ((SOLVED, group("a", [0.0, 0.0], dropped_because="stale"), SOLVED), None, "not exercised"),
        ((group("a", [1.0, 1.0], dropped_because="all_succeeded"), RESCUED, SOLVED), True, "used 1 times"),
    ],
)
def test_the_success_buffer_is_judged_by_every_group_that_was_due_a_success(
    groups: tuple[dict[str, Any], ...], ok: bool | None, value: str
) -> None:
    row = rows(updates_of(*groups))["the success buffer is used"]
    assert row.ok is ok
    assert row.value.startswith(value)


def test_a_groups_own_successes_do_not_make_it_eligible_under_arpos_rule() -> None:
    # Mean 0.03 and standard deviation 0.05 fail by ARPO's rule, although one member exceeds the threshold.
    low = group("a", [0.12, *[0.0] * 7], used_candidate=False)
    expected = replace(EXPECTED, replace_when="low_mean_low_std")
    assert rows(updates_of(low, SOLVED), expected=expected)["the success buffer is used"].ok is None
    assert rows(updates_of(low, low), expected=expected)["the success buffer is used"].ok is False


def test_an_update_that_a_resumed_run_repeats_is_judged_once() -> None:
    metrics = [*updates_of(SOLVED, FAILED), *[line for line in updates_of(SOLVED, RESCUED) if line["kind"] == "update"]]
    assert rows(metrics)["the success buffer is used"].ok


def test_records_of_an_earlier_version_leave_the_success_buffer_unjudged() -> None:
    metrics = [{key: value for key, value in line.items() if key != "groups"} for line in good_run()]
    row = rows(metrics)["the success buffer is used"]
    assert row.ok is None and row.value.startswith("not recorded")
