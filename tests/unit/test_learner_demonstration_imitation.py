"""Order of the batches in which a folder of demonstrations is imitated."""

from __future__ import annotations

from deskrl.learner.demonstration_imitation import epoch_batches


def test_each_epoch_has_every_demonstration_once_in_an_order_of_its_own() -> None:
    batches = list(epoch_batches(10, batch_size=4, num_epochs=2, seed=1))
    assert [len(batch) for batch in batches] == [4, 4, 2] * 2
    first, second = ([index for batch in epoch for index in batch] for epoch in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_the_order_depends_on_the_seed_only() -> None:
    assert list(epoch_batches(10, 4, 1, seed=1)) == list(epoch_batches(10, 4, 1, seed=1))
    assert list(epoch_batches(10, 4, 1, seed=1)) != list(epoch_batches(10, 4, 1, seed=2))
