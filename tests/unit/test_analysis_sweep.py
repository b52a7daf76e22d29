"""`deskrl sweep`: which runs a sweep has, which of them are run or skipped, which input is rejected, and the report."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from deskrl.analysis.sweep import sweep_page
from deskrl.analysis.sweep.sweep_config import START, Sweep, SweepRun, read_sweep
from deskrl.analysis.sweep.sweep_runner import is_complete, run_pending, sweep_lock
from deskrl.cli.main import main
from deskrl.core.config import dump_config
from deskrl.core.errors import UserError
from deskrl.core.file_io import write_json
from deskrl.core.process_lifecycle import StopEvent

SWEEPS = Path(__file__).parents[2] / "deploy" / "sweeps"
FILE = """
name = "try"
title = "Which?"
run = "run.toml"
seeds = [0, 1]
{start}
[every]
learner.grpo = {{ max_env_steps = 100, learning_rate = 1e-3 }}
[arms.one]
[arms.other]
learner.grpo.importance_weighting = "off"
tasks.ids = ["write-a-word"]
"""
RUN = 'learner.warm_start.demos_per_task = 2\nruns = "{runs}"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(RUN.format(runs=tmp_path / "runs"))
    (tmp_path / "sweep.toml").write_text(FILE.format(start=""))
    return tmp_path / "sweep.toml"


def edit(file: Path, old: str, new: str) -> Path:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return file


def finish(run: SweepRun, *rates: float) -> None:
    """Write the directory of a finished run with updates of 50 steps each and these success rates."""
    run_dir = run.run_dir
    run_dir.create()
    dump_config(run.config, run_dir.config)
    for number, rate in enumerate(rates, start=1):
        record = {"update": number, "success_rate": rate, "num_env_steps": 50, "num_episodes": 4, "replayed": 0}
        spread = {"staleness_mean": 0.5, "staleness_max": 1, "dropped": {}, "without_spread": 0}
        run_dir.append_metrics("update", **record, **spread, seconds={"wait": 30.0, "learn": 30.0})
    write_json(run_dir.supervisor, {"state": "finished", "started_unix_s": 1.0})


def test_each_arm_has_one_run_per_seed_with_a_command_of_its_own(file: Path) -> None:
    sweep = read_sweep(file)
    assert [run.name for run in sweep.runs] == ["one-s0", "other-s0", "one-s1", "other-s1"]
    assert sweep.root == file.parent / "runs" / "try" and sweep.env_steps == 100
    _, other = sweep.runs_of_arm("other")
    grpo = other.config.learner.grpo
    assert (grpo.importance_weighting, grpo.max_env_steps, grpo.learning_rate, other.config.seed) == (
        "off",
        100,
        1e-3,
        1,
    )
    assert other.config.run_dir == sweep.root / "other-s1"
    assert "--learner.grpo.importance_weighting off" in other.command and other.command.startswith("deskrl up ")
    assert other.config.tasks.ids == ("write-a-word",)


def test_with_a_start_table_all_arms_of_a_seed_start_from_one_policy(file: Path) -> None:
    sweep = read_sweep(edit(file, "[every]", "[start]\nlearner.warm_start.demos_per_task = 3\n[every]"))
    assert [run.name for run in sweep.runs[:3]] == ["start-s0", "one-s0", "other-s0"]
    start, one, *_ = sweep.runs
    assert start.config.learner.grpo.num_updates == 0 and start.config.learner.warm_start is not None
    assert start.config.learner.warm_start.demos_per_task == 3
    assert one.config.learner.warm_start is None
    assert one.config.model.path == start.config.run_dir / "checkpoints" / "epoch_0"


def test_command_line_options_apply_to_every_run(file: Path) -> None:
    sweep = read_sweep(file, ["--learner.grpo.max_env_steps", "40", "--desktop.num_envs=2"], runs=file.parent / "else")
    assert {run.config.desktop.num_envs for run in sweep.runs} == {2}
    assert (sweep.env_steps, sweep.root) == (40, file.parent / "else" / "try")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "max_env_steps = 100, ",
            "",
            "at equal environment steps, but learner.grpo.max_env_steps is 0",
        ),
        ('importance_weighting = "off"', "max_env_steps = 50", "learner.grpo.max_env_steps is 50, 100"),
        (
            'importance_weighting = "off"',
            "importanc = 1",
            "other: learner.grpo.importanc: unknown key (hint: did you mean learner.grpo.importance_cap",
        ),
        ("learner.grpo.importance_weighting", "seed", "seed: set by the sweep for each run"),
        ("[arms.other]", "[arms.start]", "start is reserved for the warm starts"),
        ("seeds = [0, 1]", "seeds = [1, 1]", "a seed occurs twice"),
        ("seeds = [0, 1]", "seds = [0, 1]", "seds: Extra inputs are not permitted"),
        ('run = "run.toml"', 'run = "gone.toml"', "gone.toml: not found"),
        ("[every]", "[every", "not readable as TOML"),
    ],
)
def test_invalid_input_is_an_error_of_one_line(
    file: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    assert main(["sweep", str(edit(file, old, new))]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_a_complete_run_is_skipped_and_one_with_another_configuration_is_rejected(file: Path) -> None:
    sweep = read_sweep(file)
    one = sweep.runs[0]
    assert not is_complete(one)
    finish(one, 0.5, 0.5)
    assert is_complete(one)
    changed = read_sweep(edit(file, "learning_rate = 1e-3", "learning_rate = 2e-3"))
    with pytest.raises(UserError, match=r"one-s0: started with other values of learner\.grpo\.learning_rate"):
        is_complete(changed.runs[0])
    assert main(["sweep", str(file)]) == 2, "before any run is started"


def test_a_failed_run_is_reported_and_the_others_are_run(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        sweep = read_sweep(file, ["--replay.address", address])
        for run in sweep.runs[2:]:
            finish(run, 0.5, 0.5)
        completed: list[int] = []
        with sweep_lock(sweep):
            missing = run_pending(sweep, StopEvent(), lambda: completed.append(1))
    assert list(missing) == ["one-s0", "other-s0"] and not completed
    assert "failed with status 2: deskrl: " in missing["one-s0"] and "cannot listen on" in missing["one-s0"]
    output = capsys.readouterr().out
    assert "[1/4] one-s0: failed with status 2" in output and "[4/4] other-s1: complete" in output


def test_arms_do_not_run_without_their_warm_start_and_nothing_runs_after_a_stop(file: Path) -> None:
    edit(file, "[every]", "[start]\n[every]")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        sweep = read_sweep(edit(file, "seeds = [0, 1]", "seeds = [0]"), ["--replay.address", address])
        with sweep_lock(sweep):
            missing = run_pending(sweep, StopEvent(), lambda: None)
    assert missing.pop("start-s0").startswith("failed with status 2")
    assert set(missing.values()) == {"not run: the warm start of its seed is missing"}
    stop = StopEvent()
    stop.set()
    assert set(run_pending(sweep, stop, lambda: None).values()) == {"not run: stopped"}


def test_a_sweep_is_run_by_one_process_at_a_time(file: Path) -> None:
    sweep = read_sweep(file)
    with sweep_lock(sweep), pytest.raises(UserError, match="another process is running this sweep"), sweep_lock(sweep):
        pass


def read_json(sweep: Sweep) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((sweep.root / "sweep.json").read_text())
    return document


def test_complete_runs_are_reported_on_a_page_and_as_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = read_sweep(file)
    for run, rates in zip(sweep.runs, [(0.2, 0.4), (0.4, 0.8), (0.4, 0.4)], strict=False):
        finish(run, *rates)
    results = sweep_page.read_results(sweep)
    sweep_page.write_page(sweep, results, {"other-s1": "failed with status 2: deskrl: no"})
    document = read_json(sweep)
    assert [(arm["arm"], arm["num_seeds"]) for arm in document["arms"]] == [("one", 2), ("other", 1)]
    (difference,) = document["differences"]
    assert difference["success"] == {"mean": pytest.approx(0.3), "low": None, "high": None}, (
        "a single seed has no interval"
    )
    assert document["runs"]["one-s0"]["result"]["last_success"] == pytest.approx(0.4)
    assert document["runs"]["other-s1"]["missing"] == "failed with status 2: deskrl: no"
    html = (sweep.root / "sweep.html").read_text()
    assert html.count('class="band') == 2 and html.count("<svg") == 2
    assert "+30 points" in html and "1 of 4 runs are missing" in html and "failed with status 2" in html
    assert "http" not in html.split("<body>")[1], "the page is self-contained"
    sweep_page.print_results(sweep, results)
    assert "other - one" in capsys.readouterr().out


def test_a_run_that_ended_before_its_last_environment_step_does_not_count(file: Path) -> None:
    sweep = read_sweep(file)
    finish(sweep.runs[0], 0.5, 0.5)
    finish(sweep.runs[1], 0.5)
    results = sweep_page.read_results(sweep)
    assert results.short == {"other-s0": "ended after 50 of 100 steps: remove it and raise learner.grpo.num_updates"}
    assert not results.by_run["other"] and results.by_run["one"]
    sweep_page.write_page(sweep, results, {})
    assert "ended after 50 of 100 steps" in (sweep.root / "sweep.html").read_text()


def test_a_run_that_ended_early_is_nowhere_called_complete_or_missing(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = read_sweep(file)
    for run, rates in zip(sweep.runs, ((0.5, 0.5), (0.5,), (0.5, 0.5), (0.5, 0.5)), strict=True):
        finish(run, *rates)
    assert main(["sweep", str(file), "--dry-run"]) == 0
    assert "other-s0 (ended after 50 of 100 steps: remove it" in capsys.readouterr().out
    assert main(["sweep", str(file)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "other-s0" in line] == [
        "[2/4] other-s0: ended after 50 of 100 steps: remove it and raise learner.grpo.num_updates",
        "not compared: other-s0: ended after 50 of 100 steps: remove it and raise learner.grpo.num_updates",
    ]
    assert "[1/4] one-s0: complete" in lines and not any("missing" in line for line in lines)


@pytest.mark.parametrize("name", ["smoke", "h200", "uitars", "arpo-full"])
def test_a_run_configuration_is_not_taken_for_a_sweep_and_a_sweep_not_for_a_run(
    name: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = SWEEPS.parent / "runs" / f"{name}.toml"
    assert main(["sweep", str(run)]) == 2
    error = capsys.readouterr().err
    assert f"{run}: is a run configuration, not a sweep configuration (hint: start it with deskrl up {run}" in error
    for command in ("up", "explain", "replay", "doctor"):
        assert main([command, str(file)]) == 2
        error = capsys.readouterr().err
        assert f"{file}: is a sweep configuration, not a run configuration (hint: use deskrl sweep {file})" in error


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_sweeps_are_valid(path: Path) -> None:
    sweep = read_sweep(path)
    assert len(sweep.runs) == len(sweep.file.seeds) * (len(sweep.file.arms) + (sweep.file.start is not None))
    starts = {run.seed: run for run in sweep.runs if run.arm == START}
    for run in sweep.runs:
        if run.arm != START and starts:
            assert run.config.model.path == starts[run.seed].config.run_dir / "checkpoints" / "epoch_0"
