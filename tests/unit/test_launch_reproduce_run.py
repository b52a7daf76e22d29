"""Output of `deskrl reproduce` about updates that it cannot reproduce."""

import pytest

from deskrl.launch.reproduce_run import format_ranges


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([], ""), ([3], "3"), ([1, 2, 3], "1 to 3"), ([7, 1, 2, 4, 5, 6], "1 to 2, 4 to 7"), ([1, 3, 5], "1, 3, 5")],
)
def test_update_numbers_are_formatted_as_ranges(numbers: list[int], expected: str) -> None:
    assert format_ranges(numbers) == expected
