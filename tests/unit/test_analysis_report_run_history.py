"""Records of a run directory: gaps, damaged files and resumed runs."""

from pathlib import Path

import pytest

from deskrl.analysis.formatting import format_duration
from deskrl.analysis.report.report_view_models import comparisons
from deskrl.analysis.report.run_charts import build_run_charts
from deskrl.analysis.report.run_history import Count, curve, read_history
from deskrl.analysis.report.time_breakdown import mean_update_seconds, phase_rows, step_timings
from deskrl.core.file_io import write_json
from deskrl.core.run_dir import RunDir


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    return run_dir


def test_an_empty_run_directory_has_an_empty_history(run_dir: RunDir) -> None:
    history = read_history(run_dir)
    assert not history.is_finished
    assert history.started_unix_s is None
    assert history.duration_s == 0
    assert comparisons(history) == []


def test_the_last_record_of_a_repeated_update_counts(run_dir: RunDir) -> None:
    for update, loss in ((1, 0.5), (2, 0.4), (3, 0.3), (2, 0.8)):
        run_dir.append_metrics("update", update=update, loss=loss)
    assert curve(read_history(run_dir).updates, "loss") == [(1, 0.5), (2, 0.8), (3, 0.3)]


def test_the_kl_divergence_has_a_chart_only_in_a_run_with_a_kl_penalty(run_dir: RunDir) -> None:
    for update, kl in ((1, None), (2, 0.25)):
        titles = [chart.title for chart in build_run_charts(read_history(run_dir)).learning]
        assert "Entropy" in titles and "KL from the reference" not in titles
        run_dir.append_metrics("update", update=update, loss=0.5, kl=kl)
    titles = [chart.title for chart in build_run_charts(read_history(run_dir)).learning]
    assert "KL from the reference" in titles


def test_a_value_that_is_not_a_finite_number_is_a_gap(run_dir: RunDir) -> None:
    for update, loss in enumerate((float("nan"), float("inf"), None, "0.1", True, 0.25), start=1):
        run_dir.append_metrics("update", update=update, loss=loss)
    assert [y for _, y in curve(read_history(run_dir).updates, "loss")] == [None] * 5 + [0.25]


def test_the_duration_starts_with_the_launcher_and_a_resumed_phase_keeps_its_row(run_dir: RunDir) -> None:
    write_json(run_dir.supervisor, {"state": "running", "started_unix_s": 100.0})
    for at, phase in ((110, "loading"), (120, "training"), (150, "loading"), (155, "training"), (200, "finished")):
        run_dir.append_metrics("phase", unix_s=at, phase=phase)
    history = read_history(run_dir)
    assert history.is_finished and history.duration_s == 100
    rows = {row.name: row for row in phase_rows(history.phases, history.duration_s)}
    assert {name: row.total_s for name, row in rows.items()} == {"starting": 10, "loading": 15, "training": 75}
    assert rows["training"].spans == [(0.2, 0.3), (0.55, 0.45)]


def test_success_before_and_after_is_compared_overall_and_by_task(run_dir: RunDir) -> None:
    run_dir.append_metrics("eval", when="before", per_task={"note": {"n": 50, "success": 10}})
    after = {"note": {"n": 48, "success": 40}, "paint": {"n": 48, "success": 24}}
    run_dir.append_metrics("eval", when="after", episodes=96, successes=64, per_task=after)
    overall, note, paint = comparisons(read_history(run_dir))
    assert (overall.before, overall.after) == (Count(10, 50), Count(64, 96))
    assert note.difference is not None and note.difference[0] == pytest.approx(100 * (40 / 48 - 0.2))
    assert paint.before is None and paint.difference is None


def test_parts_of_an_update_are_mean_seconds_with_the_longest_first(run_dir: RunDir) -> None:
    run_dir.append_metrics("update", update=1, seconds={"wait": 1.0, "learn": 3.5})
    run_dir.append_metrics("update", update=2, seconds={"wait": 2.0})
    assert mean_update_seconds(read_history(run_dir)) == [("learn", 1.75), ("wait", 1.5)]


def test_parts_of_a_step_are_means_over_updates_in_their_order_within_a_step(run_dir: RunDir) -> None:
    first = {"decode": {"median": 50.0, "p90": 80.0}, "act": {"median": 100.0, "p90": 200.0}}
    run_dir.append_metrics("update", update=1, timings_ms=first)
    run_dir.append_metrics("update", update=2, timings_ms={"act": {"median": 300.0, "p90": 400.0}})
    run_dir.append_metrics("update", update=3)
    assert step_timings(read_history(run_dir)) == [("act, all of it", 200.0, 300.0), ("act: decoding", 50.0, 80.0)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.21, "4.2 s"), (48.2, "48 s"), (552, "9 min 12 s"), (59.7, "1 min 00 s"), (11100, "3 h 05 min")],
)
def test_durations_are_formatted_in_suitable_units(seconds: float, text: str) -> None:
    assert format_duration(seconds).replace("\N{NO-BREAK SPACE}", " ") == text
