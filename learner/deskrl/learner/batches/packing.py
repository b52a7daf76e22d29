"""Packs steps into rows and rows into micro-batches.

Steps whose prompts extend one another share a row, so that their common prefix is computed once. A causal model gives a
token the same logprob whatever follows it, so packing saves work and does not change the loss. A step whose prompt does
not start with the whole row so far starts a new row. A step is never divided between rows, nor a row between
micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from deskrl.core.step_codec import Step


@dataclass(frozen=True)
class Row:
    """One sequence of the forward pass, with the action tokens in it."""

    trajectory: int
    """Index of the trajectory in the batch."""
    token_ids: tuple[int, ...]
    """Token ids of prompts and actions."""
    images: tuple[str, ...]
    """Hashes of the screenshots in the row, in order."""
    targets: tuple[int, ...]
    """Positions of the action tokens in `token_ids`; never 0."""
    behaviour_logprobs: tuple[float, ...]
    """Behaviour logprob of each target; 0 for demonstrations, which were not sampled."""
    staleness: tuple[int, ...]
    """Staleness of each target: policy versions between the one that sampled it and the current one."""
    first_step: int = 0
    """Index of the first step in the row; orders the rows of a trajectory."""
    turn_lengths: tuple[int, ...] = ()
    """Number of targets of each turn (step of the episode) in the row; empty: all targets are of one turn."""


def pack(trajectory: int, steps: Sequence[Step], staleness: Sequence[Sequence[int]], share: bool = True) -> list[Row]:
    """Return the rows of one trajectory.

    Args:
        trajectory: index of the trajectory in the batch.
        steps: steps with token ids, in order.
        staleness: staleness of each action token of each step.
        share: whether steps share rows; False is the reference that packing is tested against.
    """
    rows: list[Row] = []
    for step, step_staleness in zip(steps, staleness, strict=True):
        if not step.action_ids:
            continue
        row = _row(trajectory, step, step_staleness)
        if share and rows and _extends(step, rows[-1]):
            rows[-1] = _join(rows[-1], row)
        else:
            rows.append(row)
    return rows


def token_staleness(step: Step, staleness: Mapping[tuple[str, int], int]) -> list[int]:
    """Return the staleness of each action token of a step; tokens outside all spans were not sampled and have 0.

    Args:
        step: step with version spans.
        staleness: staleness of each (lineage, step) of the spans.
    """
    values = [0] * len(step.action_ids)
    for span in step.spans:
        values[span.start : span.end] = [staleness[span.lineage, span.step]] * (span.end - span.start)
    return values


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group rows into micro-batches of at most `max_tokens` tokens; a longer row is a micro-batch of its own.

    First-fit decreasing: rows are placed from the longest to the shortest, each into the first micro-batch that has
    room for it. Returns the indices of each micro-batch's rows.
    """
    batches: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        batch = next((i for i, left in enumerate(room) if lengths[index] <= left), None)
        if batch is None:
            batches.append([index])
            room.append(max_tokens - lengths[index])
        else:
            batches[batch].append(index)
            room[batch] -= lengths[index]
    return batches


def divide_among_ranks(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Return the indices of each rank's rows: from the longest, each row goes to the rank with the fewest tokens."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(num_ranks), key=lambda r: (load[r], r))
        shares[rank].append(index)
        load[rank] += lengths[index]
    return [sorted(share) for share in shares]


def rank_micro_batches(rows: Sequence[Row], rank: int, num_ranks: int, max_tokens: int) -> list[list[Row]]:
    """Return the micro-batches of one rank; their number is the same on every rank, as each makes collective calls.

    A rank that has fewer micro-batches of its own repeats a row without targets.
    """
    lengths = [len(row.token_ids) for row in rows]
    by_rank = []
    for share in divide_among_ranks(lengths, num_ranks):
        batches = micro_batches([lengths[index] for index in share], max_tokens)
        by_rank.append([[rows[share[index]] for index in batch] for batch in batches])
    num_batches = max(len(batches) for batches in by_rank)
    filler = [replace(rows[0], targets=(), behaviour_logprobs=(), staleness=(), turn_lengths=())] if rows else []
    return by_rank[rank] + [filler] * (num_batches - len(by_rank[rank]))


def _row(trajectory: int, step: Step, staleness: Sequence[int]) -> Row:
    start = len(step.prompt_ids)
    return Row(
        trajectory=trajectory,
        token_ids=(*step.prompt_ids, *step.action_ids),
        images=step.images,
        targets=tuple(range(start, start + len(step.action_ids))),
        behaviour_logprobs=step.logprobs,
        staleness=tuple(staleness),
        first_step=step.index,
        turn_lengths=(len(step.action_ids),),
    )


def _extends(step: Step, row: Row) -> bool:
    return step.prompt_ids[: len(row.token_ids)] == row.token_ids and step.images[: len(row.images)] == row.images


def _join(row: Row, longer: Row) -> Row:
    return replace(
        longer,
        targets=row.targets + longer.targets,
        behaviour_logprobs=row.behaviour_logprobs + longer.behaviour_logprobs,
        staleness=row.staleness + longer.staleness,
        first_step=row.first_step,
        turn_lengths=row.turn_lengths + longer.turn_lengths,
    )
