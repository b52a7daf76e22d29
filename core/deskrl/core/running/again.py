"""`deskrl replay-run RUN`: does the learner, given the same batches again, find the same numbers?

Knows the order of things: a replay service over the run's own store, a learner that learns again, a table. Nothing of
the run is changed.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deskrl.core import rpc
from deskrl.core.config import read_resolved
from deskrl.core.errors import UserError
from deskrl.core.runfolder import RunFolder
from deskrl.core.running.starting import start_replay, tell_failure
from deskrl.core.running.supervisor import RoleFailed, Supervisor

_LONGEST_S = 7 * 24 * 3600.0


def replay_run(root: Path) -> int:
    """Learn again what can be of a run that is not running; returns 0 if all numbers are the same, else 1.

    Raises:
        UserError: there is no run, it is running, or none of its updates can be learnt again.
    """
    folder = RunFolder(root.absolute())
    config = read_resolved(folder.config)
    rpc.identify_as("operator", config.security.folder)
    supervisor = Supervisor(folder)
    temporary = Path(tempfile.mkdtemp(prefix="deskrl-again-"))
    try:
        start_replay(config, folder.config, supervisor)
        outcome = temporary / "outcome.json"
        supervisor.run_to_end("learn-again", "learn-again", str(folder.config), str(outcome), timeout_s=_LONGEST_S)
        compared: dict[str, Any] = json.loads(outcome.read_text(encoding="utf-8"))
    except RoleFailed as error:
        return tell_failure(error, folder)
    finally:
        supervisor.close()
        shutil.rmtree(temporary, ignore_errors=True)
    return _tell(compared, config.name)


def _tell(compared: Mapping[str, Any], name: str) -> int:
    """Print what came of it; the exit status."""
    updates, missing = compared["updates"], {int(number): why for number, why in compared["missing"].items()}
    if not updates:
        whys = "; ".join(dict.fromkeys(missing.values())) or "it has learnt nothing yet"
        mend = "keep more of the next run: learner.keep_checkpoints, replay.max_bytes"
        raise UserError(f"no update of {name} can be learnt again: {whys}", mend)
    console = Console()
    console.print(_table(name, updates))
    for why in dict.fromkeys(missing.values()):
        numbers = spans_text(number for number, other in missing.items() if other == why)
        console.print(f"not learnt again: update {numbers}: {why}", highlight=False, soft_wrap=True)
    return 0 if all(update["recorded"] == update["again"] for update in updates) else 1


def _table(name: str, updates: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=f"deskrl {name}, learnt again", title_justify="left")
    for column in ("update", "from", "loss", "loss again", "same", "what differs"):
        table.add_column(column, justify="right" if column.startswith("loss") else "left")
    for update in updates:
        recorded, again = update["recorded"], update["again"]
        differing = [f"{key} {recorded[key]!r}, {again[key]!r}" for key in recorded if recorded[key] != again[key]]
        table.add_row(
            str(update["update"]),
            update["checkpoint"],
            repr(recorded["loss"]),
            repr(again["loss"]),
            "[red]no" if differing else "[green]bit for bit",
            "; ".join(differing),
        )
    return table


def spans_text(numbers: Iterable[int]) -> str:
    """Numbers as spans: 1 to 4, 7."""
    found = sorted(numbers)
    starts = [found[0], *(later for earlier, later in pairwise(found) if later > earlier + 1)] if found else []
    ends = [*(earlier for earlier, later in pairwise(found) if later > earlier + 1), found[-1]] if found else []
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(start) if start == end else f"{start} to {end}" for start, end in pairs)
