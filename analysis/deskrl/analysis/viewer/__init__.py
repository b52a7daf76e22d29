"""Browser pages of a run: its episodes (`deskrl view RUN`), and its desktops live (`deskrl watch RUN`).

The viewer reads the run directory and its replay store, takes no lock and changes nothing. `pages` renders,
`episode_view_models` and `token_table` prepare what is shown, and `app` serves.
"""

from __future__ import annotations

from pathlib import Path

from deskrl.analysis.evaluation.task_sets import is_task_set
from deskrl.analysis.loopback_server import LoopbackServer
from deskrl.analysis.run_config import read_run_config
from deskrl.analysis.viewer.app import create_app
from deskrl.analysis.viewer.pages import ViewerPages
from deskrl.core import process_lifecycle
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir
from deskrl.launch.run_control import is_running

__all__ = ["view", "watch"]


def view(root: Path, port: int) -> int:
    """Serve the pages of the run in `root` until SIGINT or SIGTERM; returns the exit status.

    Args:
        root: run directory.
        port: port on the loopback address; 0: any free port.

    Raises:
        UserError: `root` contains no run, its replay store cannot be read, or the port cannot be used.
    """
    run_dir = _viewed_run(root)
    return _serve(run_dir, port, f"viewing {run_dir.root}", "")


def watch(root: Path, port: int) -> int:
    """Serve the pages of a run in progress, first that of its live desktops; otherwise like `view`.

    Raises:
        UserError: as `view`, or the run is not in progress on this machine.
    """
    run_dir = _viewed_run(root)
    read_run_config(run_dir)
    if not is_running(run_dir):
        raise UserError(f"{root}: is not running here: no desktop is live", f"see its episodes: deskrl view {root}")
    return _serve(run_dir, port, f"watching the desktops of {run_dir.root}", "live")


def _viewed_run(root: Path) -> RunDir:
    """Return the run directory; that of the evaluation for one of its task sets, because it has the episodes of all."""
    run_dir = RunDir(root.absolute())
    return RunDir(run_dir.root.resolve().parents[1]) if is_task_set(run_dir.root) else run_dir


def _serve(run_dir: RunDir, port: int, doing: str, page: str) -> int:
    config = read_run_config(run_dir)
    stop = process_lifecycle.stop_event()
    with LoopbackServer(create_app(ViewerPages(config)), port) as server:
        print(f"{doing} at {server.url}{page} (Ctrl-C to stop)", flush=True)
        stop.wait()
    return 0
