"""Each rule of the chaos program finds what it is there to find: a sound record, broken in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from chaos_kit.checks import (
    all_is_learnt,
    find_wrong,
    groups_are_whole,
    nothing_acknowledged_is_lost,
    nothing_is_doubled,
    nothing_is_orphaned,
    only_who_is_hurt_ends,
    staleness_is_bounded,
    weights_are_verified,
)
from chaos_kit.record import Acknowledged, Record, StoredEpisode, StoredGroup

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


def sound() -> Record:
    """One group of two, learnt from in the only update."""
    update = {"update": 1, "staleness_max": 0, "mismatch_max": 1e-5}
    return Record(
        num_updates=1,
        rollouts=2,
        max_staleness=1,
        acknowledged=[Acknowledged(name, 1.0, 2, 0.0) for name in NAMES],
        episodes={name: episode(name) for name in NAMES},
        groups=[StoredGroup(GROUP, "consumed", 0, 0, 2, 0)],
        committed=frozenset({"train/000001"}),
        learnt={"train/000001": {GROUP: frozenset(NAMES)}},
        history=[update],
        updates=[update],
        weights=[{"lineage": "one", "version": 0, "ok": True, "error": ""}],
        endings=[],
        orphans=[],
    )


def with_episode(**changes: Any) -> Record:
    record = sound()
    return replace(record, episodes={**record.episodes, NAMES[0]: replace(episode(NAMES[0]), **changes)})


def with_group(**changes: Any) -> Record:
    return replace(sound(), groups=[replace(sound().groups[0], **changes)])


def with_update(**changes: Any) -> Record:
    return replace(sound(), updates=[{**sound().updates[0], **changes}])


def with_weights(**changes: Any) -> Record:
    return replace(sound(), weights=[{**sound().weights[0], **changes}])


def learnt_in_two_batches() -> Record:
    groups: Mapping[str, frozenset[str]] = sound().learnt["train/000001"]
    return replace(sound(), learnt={"train/000001": groups, "train/000002": groups})


def without_an_episode() -> Record:
    return replace(sound(), episodes={NAMES[1]: episode(NAMES[1])})


BROKEN: list[tuple[Callable[..., Any], Record, str]] = [
    (nothing_acknowledged_is_lost, without_an_episode(), "is not there"),
    (nothing_acknowledged_is_lost, with_episode(state="planned"), "is planned"),
    (nothing_acknowledged_is_lost, with_episode(reward=0.0), "was acknowledged with reward and steps (1.0, 2)"),
    (nothing_acknowledged_is_lost, with_episode(step_indices=(0,)), "of which (0,) are there"),
    (nothing_acknowledged_is_lost, with_episode(lost_images=("ab",)), "lacks 1 of its screenshots"),
    (nothing_is_doubled, replace(sound(), acknowledged=[*sound().acknowledged] * 2), "acknowledged 2 times"),
    (nothing_is_doubled, learnt_in_two_batches(), "in 2 batches"),
    (groups_are_whole, with_group(num_finished=1), "1 finished and 0 faulted of 2 members"),
    (groups_are_whole, with_group(num_leased=1), "1 of its members still leased"),
    (groups_are_whole, with_episode(state="faulted"), "counts 2 finished and 0 faulted"),
    (groups_are_whole, replace(sound(), learnt={"train/000001": {GROUP: frozenset()}}), "learnt []"),
    (staleness_is_bounded, with_update(staleness_max=2), "2 versions old"),
    (weights_are_verified, with_weights(ok=False), "which no replica has proven"),
    (weights_are_verified, with_weights(error="its canary differs by 1"), "arrived as another"),
    (weights_are_verified, with_update(mismatch_max=0.1), "differ by 0.1"),
    (all_is_learnt, replace(sound(), history=[]), "has behind it the updates []"),
    (all_is_learnt, replace(sound(), updates=[]), "the metrics lack the updates [1]"),
    (all_is_learnt, replace(sound(), committed=frozenset()), "differ by ['train/000001']"),
    (only_who_is_hurt_ends, replace(sound(), endings=["learner ended by itself"]), "learner ended"),
    (nothing_is_orphaned, replace(sound(), orphans=["process 1"]), "process 1"),
]


def test_nothing_is_wrong_with_a_sound_record() -> None:
    assert find_wrong(sound()) == []


@pytest.mark.parametrize(("check", "record", "told"), BROKEN)
def test_what_is_broken_is_found_and_named(check: Callable[..., Any], record: Record, told: str) -> None:
    findings = list(check(record))
    assert any(told in finding for finding in findings), findings
    assert {f"{check.__name__}: {finding}" for finding in findings} <= set(find_wrong(record))


def test_a_stored_success_may_stand_for_one_member() -> None:
    record = replace(sound(), learnt={"train/000001": {GROUP: frozenset(NAMES[1:])}})
    assert find_wrong(record) == []
