"""The notebooks of examples/notebooks: valid, committed with their outputs, and without traces of a machine."""

from __future__ import annotations

import getpass
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from notebook_kit import (
    ABSOLUTE_PATH,
    GENERAL_NAMES,
    NOTEBOOKS,
    ROOT,
    output_texts,
    scrubbed,
    source_of,
    with_parameters,
)

OUTPUT_KEYS = {
    "stream": {"output_type", "name", "text"},
    "display_data": {"output_type", "data", "metadata"},
    "execute_result": {"output_type", "data", "metadata", "execution_count"},
}
"""Keys of the outputs of nbformat 4.5 other than errors, all of which are required."""
NAMED_FILE = re.compile(r"(?<![\w./-])(?:actor|deploy|docs)/[\w./-]*\w")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def stream(text: str) -> dict[str, Any]:
    return {"output_type": "stream", "name": "stdout", "text": [text]}


def small_notebook(*outputs: dict[str, Any]) -> dict[str, Any]:
    cell = {"cell_type": "code", "id": "parameters", "metadata": {}, "execution_count": 1, "outputs": list(outputs)}
    return {"cells": [{**cell, "source": ["UPDATES = 16  # of GRPO\n", 'NAME = "mine"']}], "metadata": {}}


def test_there_are_three_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["evaluation", "smoke_run", "two_machines"]


@every_notebook
def test_a_notebook_has_the_format_4_5_without_volatile_metadata(path: Path) -> None:
    notebook = read(path)
    assert notebook.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook["metadata"] == {"kernelspec": kernel, "language_info": {"name": "python"}}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-z][a-z-]{0,63}", name) for name in ids)
    for cell in notebook["cells"]:
        results = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | results
        assert cell["cell_type"] in ("code", "markdown") and cell["metadata"] == {}
        assert all(isinstance(line, str) for line in cell["source"]) and source_of(cell).strip()


@every_notebook
def test_a_notebook_is_committed_with_the_outputs_of_one_execution_without_errors(path: Path) -> None:
    cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for output in (output for cell in cells for output in cell["outputs"]):
        assert output["output_type"] in OUTPUT_KEYS and output.keys() == OUTPUT_KEYS[output["output_type"]]
        assert output.get("name") != "stderr"
    # Cells that only assign values print nothing.
    silent = {cell["id"] for cell in cells if not cell["outputs"]}
    assert silent <= {"parameters", "configuration"}


@every_notebook
def test_the_outputs_of_a_notebook_show_nothing_of_the_machine_that_made_them(path: Path) -> None:
    names = {socket.gethostname(), getpass.getuser()} - GENERAL_NAMES
    for text in output_texts(read(path)):
        assert [found.group() for found in ABSOLUTE_PATH.finditer(text)] == []
        assert [name for name in names if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)] == []
        assert re.findall(r"^\[\d{4}-\d\d-\d\d ", text, re.M) == [], "a library's log"


@every_notebook
def test_a_notebook_names_only_files_that_exist(path: Path) -> None:
    named = {name for cell in read(path)["cells"] for name in NAMED_FILE.findall(source_of(cell))}
    assert named and [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_an_absolute_path_is_found_except_those_that_all_machines_have() -> None:
    assert ABSOLUTE_PATH.search("written to /srv/jobs/run.log")
    assert not any(map(ABSOLUTE_PATH.search, ("/usr/lib/chromium", "free in /dev/shm", "12/16 a/b", "https://a.org/b")))


def test_other_parameters_replace_only_the_values_of_the_parameters_cell() -> None:
    changed = with_parameters(small_notebook(), {"UPDATES": 2})
    assert source_of(changed["cells"][0]) == 'UPDATES = 2\nNAME = "mine"'
    with pytest.raises(ValueError, match="DESKTOPS"):
        with_parameters(small_notebook(), {"DESKTOPS": 2})


def test_outputs_are_stored_as_one_stream_with_relative_paths() -> None:
    progress = stream("[2026-12-01 05:32:42,097] [WARNING] a library's log\n1 of 2\r2 of 2\rreport ")
    executed = small_notebook(progress, stream(f"{ROOT}/runs/a/report.html\n"), stream(f"free at {ROOT}\n"))
    (cell,) = scrubbed(executed, small_notebook())["cells"]
    (output,) = cell["outputs"]
    assert output["text"] == ["report runs/a/report.html\n", "free at deskrl\n"]
