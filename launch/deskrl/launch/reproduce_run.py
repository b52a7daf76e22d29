"""`deskrl reproduce RUN`: trains again on the recorded batches of a run and compares all numbers bit for bit.

A replay service serves the run's store to a learner that repeats each update from the checkpoint before it. The run
directory is not changed.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from deskrl.core import rpc
from deskrl.core.config import RunConfig, dump_config, read_resolved
from deskrl.core.console import table_console
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir
from deskrl.core.run_identity import read_identity
from deskrl.launch.port_assignment import PortReservation, assign_ports
from deskrl.launch.role_launch import report_role_failure, start_replay
from deskrl.launch.run_state import check_is_run, has_started_training
from deskrl.launch.supervisor import RoleFailed, Supervisor

_LONGEST_S = 7 * 24 * 3600.0


def reproduce(root: Path) -> int:
    """Reproduce every update whose batch and checkpoint are kept; returns 0 if all numbers are equal, else 1.

    Raises:
        UserError: there is no training run, it is running, or none of its updates can be reproduced.
    """
    folder = RunDir(root.absolute())
    check_is_run(folder, "nothing can be reproduced")
    # The directory may have been moved since the run was started.
    config = read_resolved(folder.config).model_copy(update={"runs": folder.root.parent, "name": folder.root.name})
    if not has_started_training(folder):
        raise UserError(f"{folder.root}: the run has no update yet", "name a run with at least one update")
    rpc.load_own_identity("operator", config.security.certificates_dir)
    rpc.set_run(read_identity(folder, config.name))
    supervisor = Supervisor(folder)
    temporary = Path(tempfile.mkdtemp(prefix="deskrl-reproduce-"))
    reservation = PortReservation()
    try:
        # Its own ports may be in use by another run.
        config = assign_ports(_on_one_node(config), (), reservation)
        resolved, outcome = temporary / "config.json", temporary / "outcome.json"
        dump_config(config, resolved)
        start_replay(config, resolved, supervisor)
        supervisor.run_to_end(
            "reproduce-updates", "reproduce-updates", str(resolved), str(outcome), timeout_s=_LONGEST_S
        )
        compared: dict[str, Any] = json.loads(outcome.read_text(encoding="utf-8"))
    except RoleFailed as error:
        return report_role_failure(error, folder)
    finally:
        supervisor.close()
        reservation.close()
        shutil.rmtree(temporary, ignore_errors=True)
    return _print_outcome(compared, config.name)


def _on_one_node(config: RunConfig) -> RunConfig:
    """Return the configuration with the ranks of all nodes on this machine: their number decides the rounding."""
    learner = config.learner
    if learner.num_nodes == 1:
        return config
    here = {"num_nodes": 1, "num_processes": learner.num_ranks, "devices": (), "master_port": 0}
    return config.model_copy(update={"learner": learner.model_copy(update=here)})


def _print_outcome(compared: Mapping[str, Any], name: str) -> int:
    """Print the comparison; returns the exit status."""
    updates, missing = compared["updates"], {int(number): why for number, why in compared["missing"].items()}
    if not updates:
        whys = "; ".join(dict.fromkeys(missing.values())) or "it has made no update"
        hint = "raise learner.keep_checkpoints and replay.max_bytes in the next run"
        raise UserError(f"no update of {name} can be reproduced: {whys}", hint)
    console = table_console()
    console.print(_table(name, updates))
    for why in dict.fromkeys(missing.values()):
        numbers = format_ranges(number for number, other in missing.items() if other == why)
        console.print(f"not reproduced: update {numbers}: {why}", highlight=False, soft_wrap=True)
    return 0 if all(update["recorded"] == update["again"] for update in updates) else 1


def _table(name: str, updates: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=f"deskrl {name}, reproduced", title_justify="left")
    for column in ("update", "checkpoint", "loss", "loss reproduced", "equal", "differences"):
        table.add_column(column, justify="right" if column.startswith("loss") else "left")
    for update in updates:
        recorded, again = update["recorded"], update["again"]
        differing = [f"{key} {recorded[key]!r}, {again[key]!r}" for key in recorded if recorded[key] != again[key]]
        table.add_row(
            str(update["update"]),
            update["checkpoint"],
            repr(recorded["loss"]),
            repr(again["loss"]),
            "[red]no" if differing else "[green]yes",
            "; ".join(differing),
        )
    return table


def format_ranges(numbers: Iterable[int]) -> str:
    """Format numbers as ranges, such as "1 to 4, 7"."""
    found = sorted(numbers)
    starts = [found[0], *(later for earlier, later in pairwise(found) if later > earlier + 1)] if found else []
    ends = [*(earlier for earlier, later in pairwise(found) if later > earlier + 1), found[-1]] if found else []
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(start) if start == end else f"{start} to {end}" for start, end in pairs)
