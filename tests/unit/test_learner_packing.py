"""Packing: which steps share a row, what a row contains, and how rows are divided among ranks."""

from hypothesis import given
from hypothesis import strategies as st

from deskrl.core.step_codec import Step, VersionSpan
from deskrl.learner.batches.packing import (
    Row,
    divide_among_ranks,
    micro_batches,
    pack,
    rank_micro_batches,
    token_staleness,
)


def step(
    prompt: tuple[int, ...], action: tuple[int, ...], images: tuple[str, ...], first_logprob: float = -1.0
) -> Step:
    logprobs = tuple(first_logprob - index for index in range(len(action)))
    return Step(
        index=0, screenshot=images[-1], images=images, text="", prompt_ids=prompt, action_ids=action, logprobs=logprobs
    )


FIRST = step((1, 2), (3, 4), ("a",))
SECOND = step((1, 2, 3, 4, 5), (6,), ("a", "b"), first_logprob=-10.0)


def test_a_step_whose_prompt_extends_the_previous_step_shares_its_row() -> None:
    (row,) = pack(0, [FIRST, SECOND], [[0, 1], [2]])
    assert row == Row(
        trajectory=0,
        token_ids=(1, 2, 3, 4, 5, 6),
        images=("a", "b"),
        targets=(2, 3, 5),
        behaviour_logprobs=(-1.0, -2.0, -10.0),
        staleness=(0, 1, 2),
        turn_lengths=(2, 1),
    )


def test_a_step_with_another_prompt_starts_a_new_row() -> None:
    slid = step((1, 9, 5), (6,), ("b",))
    assert [row.targets for row in pack(0, [FIRST, slid], [[0, 0], [0]])] == [(2, 3), (3,)]


def test_the_same_token_ids_with_other_screenshots_start_a_new_row() -> None:
    other_image = step((1, 2, 3, 4, 5), (6,), ("x", "b"))
    assert len(pack(0, [FIRST, other_image], [[0, 0], [0]])) == 2


def test_a_prompt_that_differs_from_the_sampled_history_starts_a_new_row() -> None:
    rewritten = step((1, 2, 3, 7, 5), (6,), ("a", "b"))
    assert len(pack(0, [FIRST, rewritten], [[0, 0], [0]])) == 2


def test_a_step_without_action_tokens_has_no_row() -> None:
    assert pack(0, [step((1, 2), (), ("a",))], [[]]) == []


def test_every_token_has_the_staleness_of_its_span() -> None:
    spans = (VersionSpan("here", 3, 0, 2), VersionSpan("here", 4, 2, 3))
    sampled = Step(index=0, screenshot="a", images=("a",), text="", action_ids=(7, 8, 9), spans=spans)
    assert token_staleness(sampled, {("here", 3): 1, ("here", 4): 0}) == [1, 1, 0]


LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 600))
def test_micro_batches_contain_every_row_once_within_the_token_limit(lengths: list[int], budget: int) -> None:
    batches = micro_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert sum(lengths[index] for index in batch) <= budget or len(batch) == 1


def test_a_micro_batch_is_filled_before_another_one_is_started() -> None:
    assert micro_batches([5, 60, 30, 50, 20], max_tokens=100) == [[1, 2, 0], [3, 4]]


@given(LENGTHS, st.integers(1, 4))
def test_ranks_share_all_rows_and_their_loads_differ_by_at_most_one_row(lengths: list[int], num_ranks: int) -> None:
    shares = divide_among_ranks(lengths, num_ranks)
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)


def test_ranks_have_equally_many_micro_batches_and_train_on_each_row_once() -> None:
    rows = [pack(index, [step((1,) * (3 + index), (2,), ("a",))], [[0]])[0] for index in range(5)]
    ranks = [rank_micro_batches(rows, rank, 2, max_tokens=8) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    trained = [row.trajectory for batches in ranks for batch in batches for row in batch if row.targets]
    assert sorted(trained) == list(range(5))


def test_a_rank_without_rows_gets_a_row_without_targets() -> None:
    rows = pack(0, [FIRST], [[0, 0]])
    (batch,) = rank_micro_batches(rows, 1, 2, max_tokens=8)
    assert [(row.token_ids, row.targets) for row in batch] == [(rows[0].token_ids, ())]
