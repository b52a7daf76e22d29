"""A sweep's file and cells: what is run, what is skipped, what is refused before anything starts, and what is told."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from deskrl.core.cli import main
from deskrl.core.config import dump_config
from deskrl.core.errors import UserError
from deskrl.core.lifetime import StopEvent
from deskrl.core.runfolder import RunFolder, write_json
from deskrl.core.sweep import page
from deskrl.core.sweep.drive import drive, held, is_complete
from deskrl.core.sweep.plan import START, Cell, Sweep, read_sweep

SWEEPS = Path(__file__).parents[2] / "deploy" / "sweeps"
FILE = """
name = "try"
title = "Which?"
run = "run.toml"
seeds = [0, 1]
{start}
[every]
learner.grpo = {{ env_steps = 100, learning_rate = 1e-3 }}
[arms.one]
[arms.other]
learner.grpo.importance = "off"
tasks.tasks = ["write-a-word"]
"""
RUN = 'learner.warm_start.demos_per_task = 2\nruns = "{runs}"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(RUN.format(runs=tmp_path / "runs"))
    (tmp_path / "sweep.toml").write_text(FILE.format(start=""))
    return tmp_path / "sweep.toml"


def mended(file: Path, old: str, new: str) -> Path:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return file


def finish(cell: Cell, *rates: float) -> None:
    """Leave what a run that came to its end has left: updates of 50 steps each, with these success rates."""
    folder = RunFolder(cell.config.folder)
    folder.create()
    dump_config(cell.config, folder.config)
    for number, rate in enumerate(rates, start=1):
        record = {"update": number, "success_rate": rate, "num_env_steps": 50, "num_episodes": 4, "replayed": 0}
        spread = {"staleness_mean": 0.5, "staleness_max": 1, "dropped": {}, "without_spread": 0}
        folder.append_metrics("update", **record, **spread, seconds={"wait": 30.0, "learn": 30.0})
    write_json(folder.supervisor, {"state": "finished", "started_unix_s": 1.0})


def test_cells_are_arms_by_seeds_and_each_is_a_command_of_its_own(file: Path) -> None:
    sweep = read_sweep(file)
    assert [cell.name for cell in sweep.cells] == ["one-s0", "other-s0", "one-s1", "other-s1"]
    assert sweep.folder == file.parent / "runs" / "try" and sweep.env_steps == 100
    _, other = sweep.arm_cells("other")
    grpo = other.config.learner.grpo
    assert (grpo.importance, grpo.env_steps, grpo.learning_rate, other.config.seed) == ("off", 100, 1e-3, 1)
    assert other.config.folder == sweep.folder / "other-s1"
    assert "--learner.grpo.importance off" in other.command and other.command.startswith("deskrl up ")
    assert other.config.tasks.tasks == ("write-a-word",)


def test_with_a_start_the_arms_of_a_seed_begin_from_one_policy(file: Path) -> None:
    sweep = read_sweep(mended(file, "[every]", "[start]\nlearner.warm_start.demos_per_task = 3\n[every]"))
    assert [cell.name for cell in sweep.cells[:3]] == ["start-s0", "one-s0", "other-s0"]
    start, one, *_ = sweep.cells
    assert start.config.learner.grpo.num_updates == 0 and start.config.learner.warm_start is not None
    assert start.config.learner.warm_start.demos_per_task == 3
    assert one.config.learner.warm_start is None
    assert one.config.model.path == start.config.folder / "checkpoints" / "epoch_0"


def test_options_reach_every_cell(file: Path) -> None:
    sweep = read_sweep(file, ["--learner.grpo.env_steps", "40", "--desktop.num_envs=2"], runs=file.parent / "else")
    assert {cell.config.desktop.num_envs for cell in sweep.cells} == {2}
    assert (sweep.env_steps, sweep.folder) == (40, file.parent / "else" / "try")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("env_steps = 100, ", "", "arms are compared at equal environment steps, and learner.grpo.env_steps is 0"),
        ('importance = "off"', "env_steps = 50", "learner.grpo.env_steps is 50, 100"),
        (
            'importance = "off"',
            "importanc = 1",
            "other: error parsing CLI: unrecognized arguments: --learner.grpo.importanc",
        ),
        ("learner.grpo.importance", "seed", "seed: every cell has its own"),
        ("[arms.other]", "[arms.start]", "start is the name of the warm starts"),
        ("seeds = [0, 1]", "seeds = [1, 1]", "a seed is named twice"),
        ("seeds = [0, 1]", "seds = [0, 1]", "seds: Extra inputs are not permitted"),
        ('run = "run.toml"', 'run = "gone.toml"', "gone.toml: no such file"),
        ("[every]", "[every", "not readable as TOML"),
    ],
)
def test_bad_input_is_one_line(file: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, told: str) -> None:
    assert main(["sweep", str(mended(file, old, new))]) == 2
    refused = capsys.readouterr().err.strip()
    assert told in refused and "\n" not in refused


def test_a_complete_cell_is_skipped_and_one_of_other_values_is_refused(file: Path) -> None:
    sweep = read_sweep(file)
    one = sweep.cells[0]
    assert not is_complete(one)
    finish(one, 0.5, 0.5)
    assert is_complete(one)
    changed = read_sweep(mended(file, "learning_rate = 1e-3", "learning_rate = 2e-3"))
    with pytest.raises(UserError, match=r"one-s0 was begun with other values of learner\.grpo\.learning_rate"):
        is_complete(changed.cells[0])
    assert main(["sweep", str(file)]) == 2, "before any cell is run"


def test_a_failed_cell_is_told_and_the_others_are_run(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        sweep = read_sweep(file, ["--replay.address", address])
        for cell in sweep.cells[2:]:
            finish(cell, 0.5, 0.5)
        completed: list[int] = []
        with held(sweep):
            missing = drive(sweep, StopEvent(), lambda: completed.append(1))
    assert list(missing) == ["one-s0", "other-s0"] and not completed
    assert "failed with status 2: deskrl: " in missing["one-s0"] and "cannot be listened on" in missing["one-s0"]
    told = capsys.readouterr().out
    assert "[1/4] one-s0: failed with status 2" in told and "[4/4] other-s1: complete" in told


def test_arms_do_not_run_without_their_start_and_nothing_runs_after_a_stop(file: Path) -> None:
    mended(file, "[every]", "[start]\n[every]")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        sweep = read_sweep(mended(file, "seeds = [0, 1]", "seeds = [0]"), ["--replay.address", address])
        with held(sweep):
            missing = drive(sweep, StopEvent(), lambda: None)
    assert missing.pop("start-s0").startswith("failed with status 2")
    assert set(missing.values()) == {"not run: its start is missing"}
    stop = StopEvent()
    stop.set()
    assert set(drive(sweep, stop, lambda: None).values()) == {"not run: stopped"}


def test_a_sweep_is_driven_by_one_process(file: Path) -> None:
    sweep = read_sweep(file)
    with held(sweep), pytest.raises(UserError, match="is being swept by another process"), held(sweep):
        pass


def read_json(sweep: Sweep) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((sweep.folder / "sweep.json").read_text())
    return found


def test_what_is_complete_is_told_on_a_page_and_beside_it(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = read_sweep(file)
    for cell, rates in zip(sweep.cells, [(0.2, 0.4), (0.4, 0.8), (0.4, 0.4)], strict=False):
        finish(cell, *rates)
    findings = page.find(sweep)
    page.write(sweep, findings, {"other-s1": "failed with status 2: deskrl: no"})
    told = read_json(sweep)
    assert [(arm["arm"], arm["num_seeds"]) for arm in told["arms"]] == [("one", 2), ("other", 1)]
    (difference,) = told["differences"]
    assert difference["success"] == {"mean": pytest.approx(0.3), "low": None, "high": None}, "one seed has no interval"
    assert told["runs"]["one-s0"]["result"]["last_success"] == pytest.approx(0.4)
    assert told["runs"]["other-s1"]["missing"] == "failed with status 2: deskrl: no"
    html = (sweep.folder / "sweep.html").read_text()
    assert html.count('class="band') == 2 and html.count("<svg") == 2
    assert "+30 points" in html and "1 of 4 runs are missing" in html and "failed with status 2" in html
    assert "http" not in html.split("<body>")[1], "it needs nothing but itself"
    page.show(sweep, findings)
    assert "other - one" in capsys.readouterr().out


def test_a_run_that_ended_before_its_steps_were_used_up_counts_for_nothing(file: Path) -> None:
    sweep = read_sweep(file)
    finish(sweep.cells[0], 0.5, 0.5)
    finish(sweep.cells[1], 0.5)
    findings = page.find(sweep)
    assert findings.short == {"other-s0": "ended after 50 steps: remove it and raise learner.grpo.num_updates"}
    assert not findings.trials["other"] and findings.trials["one"]
    page.write(sweep, findings, {})
    assert "ended after 50 steps" in (sweep.folder / "sweep.html").read_text()


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_sweeps_that_come_along_are_whole(path: Path) -> None:
    sweep = read_sweep(path)
    assert len(sweep.cells) == len(sweep.file.seeds) * (len(sweep.file.arms) + (sweep.file.start is not None))
    starts = {cell.seed: cell for cell in sweep.cells if cell.arm == START}
    for cell in sweep.cells:
        if cell.arm != START and starts:
            assert cell.config.model.path == starts[cell.seed].config.folder / "checkpoints" / "epoch_0"
