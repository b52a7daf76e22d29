"""Rows: steps whose prompts extend one another share one, so that a common prefix is computed once.

A causal model gives a token the same logprob whatever follows it, so packing changes no loss; it only saves work. What
was seen is never changed: a step whose prompt does not begin with the row so far starts a row of its own. Knows token
ids and image hashes; knows no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from deskrl.core.trajectory import Step


@dataclass(frozen=True)
class Row:
    """One sequence of the forward pass, with the tokens in it that are learnt from."""

    trajectory: int
    """Index of the trajectory in the batch."""
    token_ids: tuple[int, ...]
    images: tuple[str, ...]
    targets: tuple[int, ...]
    """Positions in `token_ids` of the action tokens; never 0."""
    behaviour_logprobs: tuple[float, ...]
    """One for each target; 0 for demonstrations, which nobody sampled."""
    lags: tuple[int, ...]
    """One for each target: versions between the policy that sampled it and the one that learns."""
    first_step: int = 0
    """Index of the first step whose action is in it: what orders the rows of a trajectory."""


def pack(trajectory: int, steps: Sequence[Step], lags: Sequence[Sequence[int]], share: bool = True) -> list[Row]:
    """Rows of one trajectory.

    Args:
        trajectory: index in the batch.
        steps: in order, with ids.
        lags: for each step one number for each action token.
        share: False gives every step a row of its own (what packing is tested against).
    """
    rows: list[Row] = []
    for step, step_lags in zip(steps, lags, strict=True):
        if not step.action_ids:
            continue
        row = _row(trajectory, step, step_lags)
        if share and rows and _extends(step, rows[-1]):
            rows[-1] = _join(rows[-1], row)
        else:
            rows.append(row)
    return rows


def token_lags(step: Step, lag_of: dict[tuple[str, int], int]) -> list[int]:
    """The lag of each action token of a step, from its spans; tokens outside all spans were not sampled and get 0."""
    lags = [0] * len(step.action_ids)
    for span in step.spans:
        lags[span.start : span.end] = [lag_of[span.lineage, span.step]] * (span.end - span.start)
    return lags


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of rows that go through the model together: no more than `max_tokens`, unless one row alone is longer.

    The longest come first, each where it still fits, so that there are few batches and little room is left.
    """
    batches: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((i for i, left in enumerate(room) if lengths[index] <= left), None)
        if place is None:
            batches.append([index])
            room.append(max_tokens - lengths[index])
        else:
            batches[place].append(index)
            room[place] -= lengths[index]
    return batches


def share_out(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Indices of rows for each rank: the longest first, each to the rank that has the fewest tokens so far."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(num_ranks), key=lambda r: (load[r], r))
        shares[rank].append(index)
        load[rank] += lengths[index]
    return [sorted(share) for share in shares]


def rank_micro_batches(rows: Sequence[Row], rank: int, num_ranks: int, max_tokens: int) -> list[list[Row]]:
    """The micro-batches of one rank, equally many on every rank: collective calls must come in step.

    A rank with less to do repeats a row from which nothing is learnt.
    """
    lengths = [len(row.token_ids) for row in rows]
    of_rank = []
    for share in share_out(lengths, num_ranks):
        batches = micro_batches([lengths[index] for index in share], max_tokens)
        of_rank.append([[rows[share[index]] for index in batch] for batch in batches])
    num_batches = max(len(batches) for batches in of_rank)
    filler = [replace(rows[0], targets=(), behaviour_logprobs=(), lags=())] if rows else []
    return of_rank[rank] + [filler] * (num_batches - len(of_rank[rank]))


def _row(trajectory: int, step: Step, lags: Sequence[int]) -> Row:
    start = len(step.prompt_ids)
    return Row(
        trajectory=trajectory,
        token_ids=(*step.prompt_ids, *step.action_ids),
        images=step.images,
        targets=tuple(range(start, start + len(step.action_ids))),
        behaviour_logprobs=step.logprobs,
        lags=tuple(lags),
        first_step=step.index,
    )


def _extends(step: Step, row: Row) -> bool:
    return step.prompt_ids[: len(row.token_ids)] == row.token_ids and step.images[: len(row.images)] == row.images


def _join(row: Row, longer: Row) -> Row:
    return replace(
        longer,
        targets=row.targets + longer.targets,
        behaviour_logprobs=row.behaviour_logprobs + longer.behaviour_logprobs,
        lags=row.lags + longer.lags,
        first_step=row.first_step,
    )
