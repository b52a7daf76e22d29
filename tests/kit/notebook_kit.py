"""Execution of the notebooks of examples/notebooks with other parameters, and what must not be in their outputs.

`python tests/kit/notebook_kit.py examples/notebooks/NAME.ipynb` executes a notebook with its own parameters, and writes
it back with its outputs, from which everything about this machine is removed. It requires the extra `notebooks`.
"""

from __future__ import annotations

import getpass
import json
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~<>-])/(?!usr/|dev/|proc/|etc/)\w[\w.-]*/[\w.]")
"""An absolute path, except those that are the same on every machine."""
GENERAL_NAMES = {"localhost", "root", "user"}
"""Names of hosts and users that say nothing about a machine."""
TIMEOUT_S = 3000
"""Timeout of one cell, in seconds."""


def source_of(cell: Mapping[str, Any]) -> str:
    """Return the source of a cell, which nbformat writes as a list of lines."""
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def output_texts(notebook: Mapping[str, Any]) -> Iterator[str]:
    """Yield the text of every output, without images."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            texts = [output.get("text", ""), *output.get("traceback", [])]
            texts += [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
            yield from ("".join(text) for text in texts)


def with_parameters(notebook: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy whose parameters cell assigns these values.

    Raises:
        ValueError: the parameters cell does not assign one of the names.
    """
    changed: dict[str, Any] = json.loads(json.dumps(notebook))
    (cell,) = (cell for cell in changed["cells"] if cell["id"] == "parameters")
    lines = source_of(cell).splitlines(keepends=True)
    names = [line.partition(" = ")[0] for line in lines]
    if missing := parameters.keys() - set(names):
        raise ValueError(f"the parameters cell does not assign {sorted(missing)}")
    cell["source"] = [
        f"{name} = {parameters[name]!r}\n" if name in parameters else line
        for name, line in zip(names, lines, strict=True)
    ]
    return changed


def execute(path: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Execute a notebook in its own folder and return it with its outputs; an error of a cell is raised."""
    import nbformat
    from nbclient import NotebookClient

    changed = json.dumps(with_parameters(json.loads(path.read_text()), parameters))
    notebook = nbformat.reads(changed, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(
        notebook, timeout=TIMEOUT_S, kernel_name="python3", resources=resources, record_timing=False
    )
    executed: dict[str, Any] = json.loads(nbformat.writes(client.execute()))
    return executed


def scrubbed(executed: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """Return an executed notebook with the metadata of the original, one stream per cell, and relative paths."""
    outputs = {cell["id"]: cell for cell in executed["cells"] if cell["cell_type"] == "code"}
    cells = []
    for cell in original["cells"]:
        if cell["cell_type"] == "code":
            run = outputs[cell["id"]]
            cell = {**cell, "execution_count": run["execution_count"], "outputs": _scrubbed_outputs(run["outputs"])}
        cells.append(cell)
    return {**original, "cells": cells}


def write_notebook(path: Path, notebook: Mapping[str, Any]) -> None:
    """Write a notebook in the layout of nbformat."""
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def _scrubbed_outputs(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    merged: list[dict[str, Any]] = []
    for output in outputs:
        if output["output_type"] == "stream" and merged and merged[-1].get("name") == output["name"]:
            merged[-1]["text"] = [*merged[-1]["text"], *output["text"]]
        else:
            merged.append(output)
    for output in merged:
        output.get("metadata", {}).clear()
        if output["output_type"] == "stream":
            shown = re.sub(r"[^\n]*\r(?!\n)", "", "".join(output["text"]))  # without what a line of progress replaced
            shown = re.sub(r"^\[\d{4}-\d\d-\d\d [^\n]*\n", "", shown, flags=re.M)  # a library's log, with times
            output["text"] = _relative(shown).splitlines(keepends=True)
        elif "text/plain" in output.get("data", {}):
            output["data"]["text/plain"] = _relative("".join(output["data"]["text/plain"])).splitlines(keepends=True)
    return merged


def _relative(text: str) -> str:
    """Replace folders, host and user of this machine."""
    for path, name in ((f"{ROOT}/", ""), (str(ROOT), "deskrl"), (str(Path.home()), "~")):
        text = text.replace(path, name)
    for name, general in ((socket.gethostname(), "localhost"), (getpass.getuser(), "user")):
        if name in GENERAL_NAMES:
            continue
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", general, text)
    return text


def main() -> None:
    """Execute the notebooks of the command line, and write their outputs into them."""
    for path in map(Path, sys.argv[1:]):
        original = json.loads(path.read_text())
        write_notebook(path, scrubbed(execute(path, {}), original))
        print(path)


if __name__ == "__main__":
    main()
