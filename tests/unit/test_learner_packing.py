"""Rows: what shares one, what it holds, how rows are shared out."""

from hypothesis import given
from hypothesis import strategies as st

from deskrl.core.trajectory import Span, Step
from deskrl.learner.batches.packing import Row, micro_batches, pack, rank_micro_batches, share_out, token_lags


def step(
    prompt: tuple[int, ...], action: tuple[int, ...], images: tuple[str, ...], first_logprob: float = -1.0
) -> Step:
    logprobs = tuple(first_logprob - index for index in range(len(action)))
    return Step(
        index=0, screenshot=images[-1], images=images, text="", prompt_ids=prompt, action_ids=action, logprobs=logprobs
    )


FIRST = step((1, 2), (3, 4), ("a",))
SECOND = step((1, 2, 3, 4, 5), (6,), ("a", "b"), first_logprob=-10.0)


def test_a_step_whose_prompt_extends_the_one_before_shares_its_row() -> None:
    (row,) = pack(0, [FIRST, SECOND], [[0, 1], [2]])
    assert row == Row(
        trajectory=0,
        token_ids=(1, 2, 3, 4, 5, 6),
        images=("a", "b"),
        targets=(2, 3, 5),
        behaviour_logprobs=(-1.0, -2.0, -10.0),
        lags=(0, 1, 2),
    )


def test_a_step_that_saw_something_else_has_a_row_of_its_own() -> None:
    slid = step((1, 9, 5), (6,), ("b",))
    assert [row.targets for row in pack(0, [FIRST, slid], [[0, 0], [0]])] == [(2, 3), (3,)]


def test_the_same_ids_over_other_screenshots_are_another_prompt() -> None:
    other_image = step((1, 2, 3, 4, 5), (6,), ("x", "b"))
    assert len(pack(0, [FIRST, other_image], [[0, 0], [0]])) == 2


def test_a_history_that_was_not_what_was_sampled_is_another_prompt() -> None:
    rewritten = step((1, 2, 3, 7, 5), (6,), ("a", "b"))
    assert len(pack(0, [FIRST, rewritten], [[0, 0], [0]])) == 2


def test_a_step_without_sampled_tokens_has_nothing_to_learn() -> None:
    assert pack(0, [step((1, 2), (), ("a",))], [[]]) == []


def test_every_token_has_the_lag_of_its_span() -> None:
    spans = (Span("here", 3, 0, 2), Span("here", 4, 2, 3))
    sampled = Step(index=0, screenshot="a", images=("a",), text="", action_ids=(7, 8, 9), spans=spans)
    assert token_lags(sampled, {("here", 3): 1, ("here", 4): 0}) == [1, 1, 0]


LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 600))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = micro_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert sum(lengths[index] for index in batch) <= budget or len(batch) == 1


def test_a_micro_batch_is_filled_before_another_is_begun() -> None:
    assert micro_batches([5, 60, 30, 50, 20], max_tokens=100) == [[1, 2, 0], [3, 4]]


@given(LENGTHS, st.integers(1, 4))
def test_ranks_share_all_rows_and_no_rank_has_more_than_one_row_too_many(lengths: list[int], num_ranks: int) -> None:
    shares = share_out(lengths, num_ranks)
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)


def test_ranks_come_in_step_and_learn_each_row_once() -> None:
    rows = [pack(index, [step((1,) * (3 + index), (2,), ("a",))], [[0]])[0] for index in range(5)]
    ranks = [rank_micro_batches(rows, rank, 2, max_tokens=8) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    learnt = [row.trajectory for batches in ranks for batch in batches for row in batch if row.targets]
    assert sorted(learnt) == list(range(5))


def test_a_rank_without_rows_repeats_one_from_which_nothing_is_learnt() -> None:
    rows = pack(0, [FIRST], [[0, 0]])
    (batch,) = rank_micro_batches(rows, 1, 2, max_tokens=8)
    assert [(row.token_ids, row.targets) for row in batch] == [(rows[0].token_ids, ())]
