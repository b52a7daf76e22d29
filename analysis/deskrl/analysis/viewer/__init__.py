"""`deskrl view RUN`: browser pages of a run's episodes, while the run is in progress or afterwards.

The viewer reads the run directory and its replay store, takes no lock and changes nothing. `pages` renders,
`episode_view_models` and `token_table` prepare what is shown, and `app` serves.
"""

from __future__ import annotations

from pathlib import Path

from deskrl.analysis.evaluation.task_sets import is_task_set
from deskrl.analysis.run_config import read_run_config
from deskrl.analysis.viewer.app import ViewerServer, create_app
from deskrl.analysis.viewer.pages import ViewerPages
from deskrl.core import process_lifecycle
from deskrl.core.run_dir import RunDir

__all__ = ["view"]


def view(root: Path, port: int) -> int:
    """Serve the pages of the run in `root` until SIGINT or SIGTERM; returns the exit status.

    Args:
        root: run directory.
        port: port on the loopback address; 0: any free port.

    Raises:
        UserError: `root` contains no run, its replay store cannot be read, or the port cannot be used.
    """
    run_dir = RunDir(root.absolute())
    if is_task_set(run_dir.root):
        run_dir = RunDir(run_dir.root.resolve().parents[1])  # the evaluation has the episodes of all of its task sets
    config = read_run_config(run_dir)
    stop = process_lifecycle.stop_event()
    with ViewerServer(create_app(ViewerPages(config)), port) as server:
        print(f"viewing {run_dir.root} at {server.url} (Ctrl-C to stop)", flush=True)
        stop.wait()
    return 0
