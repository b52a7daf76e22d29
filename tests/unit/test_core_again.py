"""What `deskrl replay-run` says of updates that it cannot learn again."""

import pytest

from deskrl.core.running.again import spans_text


@pytest.mark.parametrize(
    ("numbers", "told"),
    [([], ""), ([3], "3"), ([1, 2, 3], "1 to 3"), ([7, 1, 2, 4, 5, 6], "1 to 2, 4 to 7"), ([1, 3, 5], "1, 3, 5")],
)
def test_numbers_are_told_as_spans(numbers: list[int], told: str) -> None:
    assert spans_text(numbers) == told
