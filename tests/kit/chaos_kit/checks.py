"""Checks that the record of a job must pass whatever faults were injected: pure functions that yield violations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from chaos_kit.record import Record, StoredEpisode, StoredGroup

MISMATCH = 1e-3
"""Maximum difference between the logprobs of a token under inference and under the learner with the same weights."""

Check = Callable[[Record], Iterator[str]]


def acknowledged_results_are_stored(record: Record) -> Iterator[str]:
    """Every result acknowledged to an actor is stored, with all steps and their screenshots."""
    for result in record.acknowledged:
        stored = record.episodes.get(result.episode_id)
        if stored is None or stored.state != "finished":
            yield f"{result.episode_id} was acknowledged, but is {stored.state if stored else 'missing'}"
            continue
        if (round(stored.reward or 0.0, 2), stored.num_steps) != (result.reward, result.num_steps):
            was, now = (result.reward, result.num_steps), (stored.reward, stored.num_steps)
            yield f"{result.episode_id} was acknowledged with reward and steps {was}, but has {now}"
    for stored in record.episodes.values():
        if stored.state == "finished":
            yield from _missing_data(stored)


def _missing_data(stored: StoredEpisode) -> Iterator[str]:
    if stored.step_indices != tuple(range(stored.num_steps)):
        yield f"{stored.episode_id} has {stored.num_steps} steps, but only {stored.step_indices} are stored"
    if stored.lost_images:
        yield f"{stored.episode_id}: {len(stored.lost_images)} of its screenshots are missing or damaged"


def nothing_is_duplicated(record: Record) -> Iterator[str]:
    """No result is acknowledged twice, and no group or episode is trained on twice."""
    acknowledged = Counter(result.episode_id for result in record.acknowledged)
    yield from (f"{name} was acknowledged {times} times" for name, times in acknowledged.items() if times > 1)
    groups = Counter(group_id for batch in record.trained.values() for group_id in batch)
    yield from (f"group {name} was trained on in {times} batches" for name, times in groups.items() if times > 1)
    episodes = Counter(name for batch in record.trained.values() for group in batch.values() for name in group)
    yield from (f"{name} was trained on {times} times" for name, times in episodes.items() if times > 1)


def groups_are_complete(record: Record) -> Iterator[str]:
    """All members of a consumed group are finished or faulted, and the learner trained on the finished ones."""
    members: dict[str, list[StoredEpisode]] = {group.group_id: [] for group in record.groups}
    for episode in record.episodes.values():
        if episode.group_id in members:
            members[episode.group_id].append(episode)
    for group in record.groups:
        if group.state == "consumed":
            yield from _incomplete(record, group, members[group.group_id])
    for batch_id, groups in record.trained.items():
        for group_id, trained in groups.items():
            finished = {member.episode_id for member in members.get(group_id, []) if member.state == "finished"}
            # One member may have been replaced by an episode of the success buffer.
            if not trained <= finished or len(finished - trained) > 1:
                yield f"{batch_id} trained on {sorted(trained)} of {group_id}, of which {sorted(finished)} are finished"


def _incomplete(record: Record, group: StoredGroup, members: list[StoredEpisode]) -> Iterator[str]:
    counts = f"{group.num_finished} finished and {group.num_faulted} faulted"
    if group.num_finished + group.num_faulted != record.num_rollouts:
        yield f"group {group.group_id} was consumed with {counts} of {record.num_rollouts} members"
    if group.num_planned or group.num_leased:
        yield f"group {group.group_id} was consumed with {group.num_leased} of its members still leased"
    states = Counter(member.state for member in members)
    if (states["finished"], states["faulted"]) != (group.num_finished, group.num_faulted):
        yield f"group {group.group_id} counts {counts}, but its episodes are {dict(states)}"


def staleness_is_bounded(record: Record) -> Iterator[str]:
    """The staleness of every token that was trained on is within the limit."""
    for update in (*record.history, *record.updates):
        if (update.get("staleness_max") or 0) > record.max_staleness:
            yield f"update {update['update']} trained on tokens {update['staleness_max']} versions old"


def weights_are_verified(record: Record) -> Iterator[str]:
    """Every version that sampled actions was verified by a replica, and no replica had other weights than were sent."""
    verified = {(entry["lineage"], entry["version"]) for entry in record.weights if entry["ok"]}
    trained = {name for batch in record.trained.values() for group in batch.values() for name in group}
    for name in sorted(trained & record.episodes.keys()):
        if unverified := record.episodes[name].versions - verified:
            yield f"{name} was trained on, but its versions {sorted(unverified)} were verified by no replica"
    for entry in record.weights:
        if "canary differs" in entry["error"] or "checksum" in entry["error"]:
            yield f"a replica received version {entry['version']} with wrong weights: {entry['error']}"
    for update in record.updates:
        if (update["mismatch_max"] or 0.0) > MISMATCH:
            yield f"update {update['update']}: logprobs of inference and learner differ by {update['mismatch_max']:.2g}"


def all_updates_are_made(record: Record) -> Iterator[str]:
    """The run made all of its updates, each once, and replay committed their batches."""
    expected = list(range(1, record.num_updates + 1))
    if (made := [entry["update"] for entry in record.history]) != expected:
        yield f"the newest checkpoint contains the updates {made}"
    if missing := set(expected) - {update["update"] for update in record.updates}:
        yield f"the metrics lack the updates {sorted(missing)}"
    if wrong := record.committed ^ {f"train/{number:06d}" for number in expected}:
        yield f"updates and consumed batches differ by {sorted(wrong)}"


def only_faulted_roles_exit(record: Record) -> Iterator[str]:
    """A role exits only because of a fault that terminates it, or at the end of the run."""
    yield from record.unexpected_exits


def nothing_is_orphaned(record: Record) -> Iterator[str]:
    """No process, desktop or folder of a desktop outlives its owner."""
    yield from record.orphans


CHECKS: tuple[Check, ...] = (
    acknowledged_results_are_stored,
    nothing_is_duplicated,
    groups_are_complete,
    staleness_is_bounded,
    weights_are_verified,
    all_updates_are_made,
    only_faulted_roles_exit,
    nothing_is_orphaned,
)


def find_violations(record: Record) -> list[str]:
    """Return all violations, each with the name of its check."""
    return [f"{check.__name__}: {violation}" for check in CHECKS for violation in check(record)]
