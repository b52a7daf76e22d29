"""Each check of fault injection reports the violation that it is meant for, in a valid record changed in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from chaos_kit.checks import (
    acknowledged_results_are_stored,
    all_updates_are_made,
    find_violations,
    groups_are_complete,
    nothing_is_duplicated,
    nothing_is_orphaned,
    only_faulted_roles_exit,
    staleness_is_bounded,
    weights_are_verified,
)
from chaos_kit.record import AcknowledgedResult, Record, StoredEpisode, StoredGroup

GROUP = "train/000000"
NAMES = tuple(f"{GROUP}.{member}" for member in range(2))


def episode(name: str) -> StoredEpisode:
    return StoredEpisode(
        episode_id=name,
        group_id=GROUP,
        state="finished",
        reward=1.0,
        num_steps=2,
        step_indices=(0, 1),
        versions=frozenset({("one", 0)}),
        lost_images=(),
    )


def valid_record() -> Record:
    """Return the record of one update on one group of two episodes."""
    update = {"update": 1, "staleness_max": 0, "mismatch_max": 1e-5}
    return Record(
        num_updates=1,
        num_rollouts=2,
        max_staleness=1,
        acknowledged=[AcknowledgedResult(name, 1.0, 2, 0.0) for name in NAMES],
        episodes={name: episode(name) for name in NAMES},
        groups=[StoredGroup(GROUP, "consumed", 0, 0, 2, 0)],
        committed=frozenset({"train/000001"}),
        trained={"train/000001": {GROUP: frozenset(NAMES)}},
        history=[update],
        updates=[update],
        weights=[{"lineage": "one", "version": 0, "ok": True, "error": ""}],
        unexpected_exits=[],
        orphans=[],
    )


def with_episode(**changes: Any) -> Record:
    record = valid_record()
    return replace(record, episodes={**record.episodes, NAMES[0]: replace(episode(NAMES[0]), **changes)})


def with_group(**changes: Any) -> Record:
    return replace(valid_record(), groups=[replace(valid_record().groups[0], **changes)])


def with_update(**changes: Any) -> Record:
    return replace(valid_record(), updates=[{**valid_record().updates[0], **changes}])


def with_weights(**changes: Any) -> Record:
    return replace(valid_record(), weights=[{**valid_record().weights[0], **changes}])


def trained_in_two_batches() -> Record:
    groups: Mapping[str, frozenset[str]] = valid_record().trained["train/000001"]
    return replace(valid_record(), trained={"train/000001": groups, "train/000002": groups})


def without_an_episode() -> Record:
    return replace(valid_record(), episodes={NAMES[1]: episode(NAMES[1])})


VIOLATIONS: list[tuple[Callable[..., Any], Record, str]] = [
    (acknowledged_results_are_stored, without_an_episode(), "is missing"),
    (acknowledged_results_are_stored, with_episode(state="planned"), "is planned"),
    (acknowledged_results_are_stored, with_episode(reward=0.0), "was acknowledged with reward and steps (1.0, 2)"),
    (acknowledged_results_are_stored, with_episode(step_indices=(0,)), "but only (0,) are stored"),
    (acknowledged_results_are_stored, with_episode(lost_images=("ab",)), "1 of its screenshots are missing or damaged"),
    (
        nothing_is_duplicated,
        replace(valid_record(), acknowledged=[*valid_record().acknowledged] * 2),
        "acknowledged 2 times",
    ),
    (nothing_is_duplicated, trained_in_two_batches(), "in 2 batches"),
    (groups_are_complete, with_group(num_finished=1), "1 finished and 0 faulted of 2 members"),
    (groups_are_complete, with_group(num_leased=1), "1 of its members still leased"),
    (groups_are_complete, with_episode(state="faulted"), "counts 2 finished and 0 faulted"),
    (groups_are_complete, replace(valid_record(), trained={"train/000001": {GROUP: frozenset()}}), "trained on []"),
    (staleness_is_bounded, with_update(staleness_max=2), "2 versions old"),
    (weights_are_verified, with_weights(ok=False), "were verified by no replica"),
    (weights_are_verified, with_weights(error="its canary differs by 1"), "with wrong weights"),
    (weights_are_verified, with_update(mismatch_max=0.1), "differ by 0.1"),
    (all_updates_are_made, replace(valid_record(), history=[]), "contains the updates []"),
    (all_updates_are_made, replace(valid_record(), updates=[]), "the metrics lack the updates [1]"),
    (all_updates_are_made, replace(valid_record(), committed=frozenset()), "differ by ['train/000001']"),
    (
        only_faulted_roles_exit,
        replace(valid_record(), unexpected_exits=["learner exited unexpectedly"]),
        "learner exited",
    ),
    (nothing_is_orphaned, replace(valid_record(), orphans=["process 1"]), "process 1"),
]


def test_a_valid_record_has_no_violations() -> None:
    assert find_violations(valid_record()) == []


@pytest.mark.parametrize(("check", "record", "expected"), VIOLATIONS)
def test_a_violation_is_reported_with_the_name_of_its_check(
    check: Callable[..., Any], record: Record, expected: str
) -> None:
    violations = list(check(record))
    assert any(expected in violation for violation in violations), violations
    assert {f"{check.__name__}: {violation}" for violation in violations} <= set(find_violations(record))


def test_an_episode_of_the_success_buffer_may_replace_one_member() -> None:
    record = replace(valid_record(), trained={"train/000001": {GROUP: frozenset(NAMES[1:])}})
    assert find_violations(record) == []
