"""Layout of charts: positions of lines, ticks and labels."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskrl.analysis.report.charts import Line, Whisker, line_chart, linear_ticks, log_ticks, running_mean, tick_label

FINITE = st.floats(-1e9, 1e9).filter(lambda value: value == 0 or abs(value) > 1e-9)


@given(st.lists(FINITE, min_size=1))
def test_linear_ticks_enclose_all_values_in_even_steps(values: list[float]) -> None:
    ticks = linear_ticks(values)
    room = 1e-6 * (ticks[-1] - ticks[0])
    assert ticks[0] <= min(values) + room and max(values) <= ticks[-1] + room
    assert 2 <= len(ticks) <= 8
    steps = [later - earlier for earlier, later in itertools.pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-3)


def test_ticks_are_round_numbers() -> None:
    assert linear_ticks([0.13, 0.92]) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert linear_ticks([3, 17], y_from=0) == [0, 5, 10, 15, 20]
    assert linear_ticks([2, 2], y_from=0) == [0, 0.5, 1, 1.5, 2]
    assert linear_ticks([]) == [0, 0.25, 0.5, 0.75, 1.0]


def test_log_ticks_are_powers_of_ten() -> None:
    assert log_ticks([3e-7, 2e-5]) == pytest.approx([1e-7, 1e-6, 1e-5, 1e-4])
    assert log_ticks([1e-6]) == pytest.approx([1e-6, 1e-5])
    assert len(log_ticks([1e-30, 1])) <= 7


@pytest.mark.parametrize(
    ("value", "ticks", "label"),
    [(0.5, [0, 0.5, 1], "0.5"), (0.25, [0, 0.25], "0.25"), (-20, [-20, 0], "−20"), (2e-6, [0, 2e-6], "2.0e-06")],
)
def test_tick_labels_have_enough_decimals_to_differ(value: float, ticks: list[float], label: str) -> None:
    assert tick_label(value, ticks, percent=False, log=False) == label


def test_percentages_and_powers_of_ten_have_their_own_label_format() -> None:
    assert tick_label(0.5, [0, 0.5, 1], percent=True, log=False) == "50%"
    assert tick_label(1e-7, [1e-7, 1e-6], percent=False, log=True) == "10⁻⁷"


def test_a_missing_value_is_a_gap_and_an_isolated_point_a_dot() -> None:
    chart = line_chart("loss", [Line([(1, 0.1), (2, 0.2), (3, None), (4, 0.3), (5, None)])])
    (line,) = chart.lines
    assert line.path.count("M") == 1
    assert len(line.dots) == 1
    assert chart.x_ticks[-1].label == "5", "the axis must cover updates without a value"


def test_a_chart_without_values_is_empty() -> None:
    assert line_chart("loss", [Line([])]).is_empty
    assert line_chart("loss", [Line([(1, None), (2, None)])]).is_empty


def test_a_logarithmic_chart_omits_zeros_and_is_linear_if_all_values_are_zero() -> None:
    (line,) = line_chart("mismatch", [Line([(1, 0.0), (2, 1e-6), (3, 1e-5)])], log=True).lines
    assert line.path.count(",") == 2
    assert not line_chart("mismatch", [Line([(1, 0.0), (2, 0.0)])], log=True).is_empty


def test_labels_of_lines_that_end_close_together_do_not_overlap() -> None:
    chart = line_chart("staleness", [Line([(1, 0.0), (2, 1.0)], "mean"), Line([(1, 0.0), (2, 1.01)], "max")])
    assert abs(chart.lines[0].label_y - chart.lines[1].label_y) >= 12


def test_whiskers_are_inside_the_chart() -> None:
    chart = line_chart("s", [Line([(1, 0.5)])], percent=True, whiskers=[Whisker(0, 0.4, 0.3, 0.5, "before")])
    (whisker,) = chart.whiskers
    assert chart.top <= whisker.high_y < whisker.y < whisker.low_y <= chart.bottom
    assert chart.left <= whisker.x <= chart.right


def test_running_mean_skips_gaps() -> None:
    smooth = running_mean([(1, 1.0), (2, None), (3, 3.0), (4, 5.0)], window=2)
    assert [y for _, y in smooth] == [1.0, 1.0, 3.0, 4.0]
    assert all(math.isfinite(y) for _, y in smooth if y is not None)
