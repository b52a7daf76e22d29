"""What has to be true of a job whatever was done to it. Pure: from a record to what is wrong with it, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from chaos_kit.record import Record, StoredEpisode, StoredGroup

MISMATCH = 1e-3
"""Largest difference of a token's logprob between who acted and who learns from it under the same version."""

Check = Callable[[Record], Iterator[str]]


def nothing_acknowledged_is_lost(record: Record) -> Iterator[str]:
    """Each result that an actor was told to be on disk is there, with its steps and their screenshots."""
    for told in record.acknowledged:
        stored = record.episodes.get(told.episode_id)
        if stored is None or stored.state != "finished":
            yield f"{told.episode_id} was acknowledged, and is {stored.state if stored else 'not there'}"
            continue
        if (round(stored.reward or 0.0, 2), stored.num_steps) != (told.reward, told.num_steps):
            was, now = (told.reward, told.num_steps), (stored.reward, stored.num_steps)
            yield f"{told.episode_id} was acknowledged with reward and steps {was}, and has {now}"
    for stored in record.episodes.values():
        if stored.state == "finished":
            yield from _gaps(stored)


def _gaps(stored: StoredEpisode) -> Iterator[str]:
    if stored.step_indices != tuple(range(stored.num_steps)):
        yield f"{stored.episode_id} has {stored.num_steps} steps, of which {stored.step_indices} are there"
    if stored.lost_images:
        yield f"{stored.episode_id} lacks {len(stored.lost_images)} of its screenshots"


def nothing_is_doubled(record: Record) -> Iterator[str]:
    """No result is taken twice, and no group or episode is learnt from twice."""
    told = Counter(one.episode_id for one in record.acknowledged)
    yield from (f"{name} was acknowledged {times} times" for name, times in told.items() if times > 1)
    groups = Counter(group_id for batch in record.learnt.values() for group_id in batch)
    yield from (f"group {name} was learnt from in {times} batches" for name, times in groups.items() if times > 1)
    learnt = Counter(name for batch in record.learnt.values() for group in batch.values() for name in group)
    yield from (f"{name} was learnt from {times} times" for name, times in learnt.items() if times > 1)


def groups_are_whole(record: Record) -> Iterator[str]:
    """A group that was consumed has all members, finished or faulted for good, and the learner had those finished."""
    members: dict[str, list[StoredEpisode]] = {group.group_id: [] for group in record.groups}
    for episode in record.episodes.values():
        if episode.group_id in members:
            members[episode.group_id].append(episode)
    for group in record.groups:
        if group.state == "consumed":
            yield from _not_whole(record, group, members[group.group_id])
    for batch_id, groups in record.learnt.items():
        for group_id, learnt in groups.items():
            finished = {one.episode_id for one in members.get(group_id, []) if one.state == "finished"}
            # A stored success takes one member's place.
            if not learnt <= finished or len(finished - learnt) > 1:
                yield f"{batch_id} learnt {sorted(learnt)} of {group_id}, which has {sorted(finished)}"


def _not_whole(record: Record, group: StoredGroup, members: list[StoredEpisode]) -> Iterator[str]:
    counts = f"{group.num_finished} finished and {group.num_faulted} faulted"
    if group.num_finished + group.num_faulted != record.rollouts:
        yield f"group {group.group_id} was consumed with {counts} of {record.rollouts} members"
    if group.num_planned or group.num_leased:
        yield f"group {group.group_id} was consumed with {group.num_leased} of its members still leased"
    states = Counter(member.state for member in members)
    if (states["finished"], states["faulted"]) != (group.num_finished, group.num_faulted):
        yield f"group {group.group_id} counts {counts}, and has {dict(states)}"


def staleness_is_bounded(record: Record) -> Iterator[str]:
    """Nothing older than the bound was learnt from."""
    for update in (*record.history, *record.updates):
        if (update.get("staleness_max") or 0) > record.max_staleness:
            yield f"update {update['update']} learnt tokens {update['staleness_max']} versions old"


def weights_are_verified(record: Record) -> Iterator[str]:
    """What acted had proven its weights, and no replica ever had others than it was sent."""
    proven = {(entry["lineage"], entry["version"]) for entry in record.weights if entry["ok"]}
    learnt = {name for batch in record.learnt.values() for group in batch.values() for name in group}
    for name in sorted(learnt & record.episodes.keys()):
        if strange := record.episodes[name].versions - proven:
            yield f"{name} was learnt from, and acted by {sorted(strange)}, which no replica has proven"
    for entry in record.weights:
        if "canary differs" in entry["error"] or "checksum" in entry["error"]:
            yield f"version {entry['version']} arrived as another: {entry['error']}"
    for update in record.updates:
        if (update["mismatch_max"] or 0.0) > MISMATCH:
            yield f"update {update['update']}: who acted and who learns differ by {update['mismatch_max']:.2g}"


def all_is_learnt(record: Record) -> Iterator[str]:
    """The run ends with the updates that it was to make, each once, and replay knows of them."""
    wanted = list(range(1, record.num_updates + 1))
    if (made := [entry["update"] for entry in record.history]) != wanted:
        yield f"the newest checkpoint has behind it the updates {made}"
    if missing := set(wanted) - {update["update"] for update in record.updates}:
        yield f"the metrics lack the updates {sorted(missing)}"
    if wrong := record.committed ^ {f"train/{number:06d}" for number in wanted}:
        yield f"updates and consumed batches differ by {sorted(wrong)}"


def only_who_is_hurt_ends(record: Record) -> Iterator[str]:
    """A role ends by a fault that ends it, or at the end."""
    yield from record.endings


def nothing_is_orphaned(record: Record) -> Iterator[str]:
    """No process, desktop or file outlives whom it belonged to."""
    yield from record.orphans


CHECKS: tuple[Check, ...] = (
    nothing_acknowledged_is_lost,
    nothing_is_doubled,
    groups_are_whole,
    staleness_is_bounded,
    weights_are_verified,
    all_is_learnt,
    only_who_is_hurt_ends,
    nothing_is_orphaned,
)


def find_wrong(record: Record) -> list[str]:
    """All that is wrong, each with the name of its rule."""
    return [f"{check.__name__}: {finding}" for check in CHECKS for finding in check(record)]
