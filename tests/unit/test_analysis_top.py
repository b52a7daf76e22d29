"""Computations and panels of `deskrl top`, on scrapes with known results."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from deskrl.analysis.top import panels
from deskrl.analysis.top.scrape import Gpu, parse, parse_gpus
from deskrl.analysis.top.timeseries import WINDOW_S, Scrape, ScrapeWindow, quantile_of


def scrape(**samples: float) -> Scrape:
    """Return samples without labels."""
    return {(name, ()): value for name, value in samples.items()}


def window(*timed: tuple[float, Mapping[str, Scrape]]) -> ScrapeWindow:
    seen = ScrapeWindow()
    for at_s, scrapes in timed:
        seen.add(at_s, scrapes)
    return seen


def test_a_rate_is_the_sum_over_processes() -> None:
    seen = window(
        (0.0, {"a": scrape(steps=10), "b": scrape(steps=0)}), (10.0, {"a": scrape(steps=30), "b": scrape(steps=5)})
    )
    assert seen.rate("steps") == pytest.approx(2.5)
    assert seen.increase("steps") == 25


def test_a_counter_of_a_restarted_process_counts_from_zero() -> None:
    seen = window((0.0, {"a": scrape(steps=100)}), (5.0, {"a": scrape(steps=104)}), (10.0, {"a": scrape(steps=6)}))
    assert seen.increase("steps") == 10


def test_one_scrape_gives_no_rate_and_old_scrapes_are_discarded() -> None:
    seen = window((0.0, {"a": scrape(steps=100)}))
    assert seen.rate("steps") is None
    seen.add(WINDOW_S + 1, {"a": scrape(steps=200)})
    assert seen.rate("steps") is None


def test_a_process_that_is_no_longer_reachable_is_not_counted() -> None:
    seen = window((0.0, {"a": scrape(up=1), "b": scrape(up=1)}), (1.0, {"a": scrape(up=1)}))
    assert seen.total("up") == 1
    assert seen.total("no_such") is None


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.5, 0.1), (0.625, 0.2), (0.25, 0.05), (0.99, 0.3)],
)
def test_quantiles_are_interpolated_inside_their_bucket(share: float, expected: float) -> None:
    """Four of eight values are below 0.1, two more below 0.3, and the others above the last bound."""
    assert quantile_of(share, {0.1: 4, 0.3: 6, math.inf: 8}) == pytest.approx(expected)


def test_a_histogram_without_observations_has_no_quantile() -> None:
    assert quantile_of(0.5, {0.1: 0, math.inf: 0}) is None
    assert quantile_of(0.5, {}) is None


def test_series_are_selected_by_label() -> None:
    text = """# TYPE desktops gauge
desktops{state="idle"} 1
desktops{state="acting"} 3
"""
    seen = window((0.0, {"a": parse(text), "b": parse(text)}))
    assert seen.total_by("desktops", "state") == {"idle": 2, "acting": 6}
    assert seen.total("desktops", state="acting") == 6


def test_gpus_are_parsed_from_the_output_of_nvidia_smi() -> None:
    output = "97, 71234, 143771\n0, 1, 143771\n[N/A], [N/A], [N/A]\n"
    assert parse_gpus(output) == [Gpu(0.97, 71234, 143771), Gpu(0.0, 1, 143771)]


def test_values_without_data_are_shown_as_dashes() -> None:
    for make_panel in (panels.environments, panels.inference, panels.training):
        panel = make_panel(ScrapeWindow())
        assert panel.rows
        assert all("-" in value for _, value in panel.rows), panel
