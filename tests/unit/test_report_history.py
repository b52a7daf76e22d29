"""What a run wrote down, read back: gaps, torn files and resumed runs."""

from pathlib import Path

import pytest

from deskrl.core.report.clock import phase_rows, turn_timings, update_seconds
from deskrl.core.report.history import Count, curve, read_history
from deskrl.core.report.page import comparisons, span_text
from deskrl.core.runfolder import RunFolder, write_json


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path)
    made.create()
    return made


def test_an_empty_folder_is_a_history_of_nothing(folder: RunFolder) -> None:
    history = read_history(folder)
    assert not history.finished
    assert history.started_unix_s is None
    assert history.duration_s == 0
    assert comparisons(history) == []


def test_of_an_update_that_was_done_twice_the_last_word_counts(folder: RunFolder) -> None:
    for update, loss in ((1, 0.5), (2, 0.4), (3, 0.3), (2, 0.8)):
        folder.append_metrics("update", update=update, loss=loss)
    assert curve(read_history(folder).updates, "loss") == [(1, 0.5), (2, 0.8), (3, 0.3)]


def test_what_is_no_finite_number_is_a_gap(folder: RunFolder) -> None:
    for update, loss in enumerate((float("nan"), float("inf"), None, "0.1", True, 0.25), start=1):
        folder.append_metrics("update", update=update, loss=loss)
    assert [y for _, y in curve(read_history(folder).updates, "loss")] == [None] * 5 + [0.25]


def test_the_clock_starts_with_the_launcher_and_a_resumed_phase_keeps_its_row(folder: RunFolder) -> None:
    write_json(folder.supervisor, {"state": "running", "started_unix_s": 100.0})
    for at, phase in ((110, "loading"), (120, "training"), (150, "loading"), (155, "training"), (200, "finished")):
        folder.append_metrics("phase", unix_s=at, phase=phase)
    history = read_history(folder)
    assert history.finished and history.duration_s == 100
    rows = {row.name: row for row in phase_rows(history.phases, history.duration_s)}
    assert {name: row.total_s for name, row in rows.items()} == {"starting": 10, "loading": 15, "training": 75}
    assert rows["training"].spans == [(0.2, 0.3), (0.55, 0.45)]


def test_before_and_after_overall_and_by_task(folder: RunFolder) -> None:
    folder.append_metrics("eval", when="before", per_task={"note": {"n": 50, "success": 10}})
    after = {"note": {"n": 48, "success": 40}, "paint": {"n": 48, "success": 24}}
    folder.append_metrics("eval", when="after", episodes=96, successes=64, per_task=after)
    overall, note, paint = comparisons(read_history(folder))
    assert (overall.before, overall.after) == (Count(10, 50), Count(64, 96))
    assert note.difference is not None and note.difference[0] == pytest.approx(100 * (40 / 48 - 0.2))
    assert paint.before is None and paint.difference is None


def test_seconds_of_an_update_are_means_with_the_longest_first(folder: RunFolder) -> None:
    folder.append_metrics("update", update=1, seconds={"wait": 1.0, "learn": 3.5})
    folder.append_metrics("update", update=2, seconds={"wait": 2.0})
    assert update_seconds(read_history(folder)) == [("learn", 1.75), ("wait", 1.5)]


def test_parts_of_a_turn_are_means_over_updates_in_the_order_of_a_turn(folder: RunFolder) -> None:
    first = {"decode": {"median": 50.0, "p90": 80.0}, "act": {"median": 100.0, "p90": 200.0}}
    folder.append_metrics("update", update=1, timings_ms=first)
    folder.append_metrics("update", update=2, timings_ms={"act": {"median": 300.0, "p90": 400.0}})
    folder.append_metrics("update", update=3)
    assert turn_timings(read_history(folder)) == [("act, all of it", 200.0, 300.0), ("act: decoding", 50.0, 80.0)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.21, "4.2 s"), (48.2, "48 s"), (552, "9 min 12 s"), (59.7, "1 min 00 s"), (11100, "3 h 05 min")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert span_text(seconds).replace("\N{NO-BREAK SPACE}", " ") == text
