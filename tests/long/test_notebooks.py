"""The notebooks of examples/notebooks run from the first to the last cell, at small size."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from notebook_kit import ROOT, execute
from ports_kit import free_port

from deskrl.actor.desktops.debian_packages import missing_packages

NOTEBOOKS = ROOT / "examples" / "notebooks"
NUM_UPDATES = 2
NOT_INSTALLED = [name for name in ("nbclient", "ipykernel", "matplotlib") if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.skipif(bool(NOT_INSTALLED), reason=f"not installed (extra notebooks): {NOT_INSTALLED}"),
    pytest.mark.skipif(bool(missing_packages()), reason=f"packages missing: {missing_packages()}"),
    pytest.mark.timeout(2400),
]


def printed(notebook: dict[str, Any], cell_id: str) -> list[str]:
    """Return the lines that a cell printed."""
    (cell,) = (cell for cell in notebook["cells"] if cell["id"] == cell_id)
    texts = ["".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream"]
    return "".join(texts).splitlines()


def table_rows(notebook: dict[str, Any], cell_id: str) -> list[list[str]]:
    """Return the cells of each row of the Markdown table that a cell displayed, without its header."""
    (cell,) = (cell for cell in notebook["cells"] if cell["id"] == cell_id)
    (table,) = (output["data"]["text/markdown"] for output in cell["outputs"] if "data" in output)
    return [[part.strip() for part in row.strip("| \n").split("|")] for row in "".join(table).splitlines()[2:]]


def num_images(notebook: dict[str, Any], cell_id: str) -> int:
    """Return the number of pictures that a cell displayed."""
    (cell,) = (cell for cell in notebook["cells"] if cell["id"] == cell_id)
    return sum("image/png" in output.get("data", {}) for output in cell["outputs"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def smoke_run(runs: Path) -> dict[str, Any]:
    """Executed notebook of the smoke run, whose checkpoint the evaluation uses."""
    parameters = {"RUNS": str(runs), "DESKTOPS": 2, "UPDATES": NUM_UPDATES, "EPISODES": 0}
    return execute(NOTEBOOKS / "smoke_run.ipynb", parameters)


def test_the_smoke_run_ends_with_met_criteria_curves_and_a_report(smoke_run: dict[str, Any], runs: Path) -> None:
    assert printed(smoke_run, "doctor")[-1] == "no problems found"
    assert printed(smoke_run, "train")[-1] == "exit status 0"
    assert printed(smoke_run, "criteria") == ["all judged criteria are met"]
    states = {criterion: state for criterion, state, _ in table_rows(smoke_run, "criteria")}
    assert len(states) == 9 and states["the run finishes"] == states["the checkpoint is valid"] == "met"
    assert num_images(smoke_run, "curves") == 1
    assert printed(smoke_run, "report") == [str(runs / "notebook-smoke" / "report.html")]


def test_where_desktops_do_not_start_the_smoke_run_trains_on_simulated_ones(tmp_path: Path) -> None:
    parameters = {"RUNS": str(tmp_path), "PROVIDER": "simulated", "UPDATES": NUM_UPDATES, "EPISODES": 0}
    simulated = execute(NOTEBOOKS / "smoke_run.ipynb", parameters)
    assert printed(simulated, "criteria") == ["all judged criteria are met"]
    assert num_images(simulated, "curves") == 1


@pytest.mark.usefixtures("smoke_run")
def test_the_evaluation_ends_with_a_table_of_ten_tasks_plain_and_noisy(runs: Path) -> None:
    checkpoint = str(runs / "notebook-smoke" / "checkpoints" / "latest")
    parameters = {"RUNS": str(runs), "CHECKPOINT": checkpoint, "DESKTOPS": 2, "REPEATS": 1}
    evaluation = execute(NOTEBOOKS / "evaluation.ipynb", parameters)
    assert printed(evaluation, "evaluate")[-1] == "exit status 0"
    *rows, total = table_rows(evaluation, "table")
    assert len({task for _, task, _, _ in rows}) == 10
    assert all(outcome in ("0/1", "1/1") for _, _, *outcomes in rows for outcome in outcomes)
    assert [outcome.strip("*").partition("/")[2] for outcome in total[2:]] == ["10", "10"]
    assert printed(evaluation, "compare")[1].startswith("tasks: 10 paired, ")
    assert num_images(evaluation, "chart") == 1


def test_a_model_on_one_machine_is_trained_with_desktops_on_another(tmp_path: Path) -> None:
    parameters = {"FOLDER": str(tmp_path), "REPLAY_PORT": free_port(), "INFERENCE_PORT": free_port()}
    two_machines = execute(NOTEBOOKS / "two_machines.ipynb", {**parameters, "UPDATES": NUM_UPDATES})
    assert printed(two_machines, "watch")[-1] == "exit status of the learner: 0"
    *table, _, verdict = printed(two_machines, "result")
    assert len(table) == 1 + NUM_UPDATES and all(row.endswith(" verified") for row in table[1:])
    assert "NOT" not in "".join(table) and verdict == "the run is complete, and all weights were verified"
    files = printed(two_machines, "files")
    assert {"run.toml", "actor.log", "certificates/actor-key.pem"} <= set(files)
    assert not [name for name in files if "model" in name or "learner" in name]
