"""`deskrl view RUN`: the episodes of a run in a browser, finished or being trained.

Reads the run's folder and its store, beside a replay service that may be writing; holds no lock and changes nothing.
`browse` asks the store, `pages` and `tokens` put it in words, `site` lays it out, `server` sends it.
"""

from __future__ import annotations

import threading
from pathlib import Path

from deskrl.core import lifetime
from deskrl.core.config import read_resolved
from deskrl.core.runfolder import RunFolder
from deskrl.replay.viewer.server import ViewerServer
from deskrl.replay.viewer.site import Site


def main(root: Path, port: int) -> int:
    """Serve the viewer of the run in `root` until SIGINT or SIGTERM; returns the exit status.

    Raises:
        UserError: there is no run, its store cannot be read, or the port is taken.
    """
    folder = RunFolder(root.absolute())
    config = read_resolved(folder.config).model_copy(update={"runs": folder.root.parent, "name": folder.root.name})
    stop = lifetime.stop_event()
    with ViewerServer(Site(config), port) as server:
        serving = threading.Thread(target=server.serve_forever, name="viewer")
        serving.start()
        print(f"the episodes of {folder.root} are at {server.url} (Ctrl-C ends this)", flush=True)
        stop.wait()
        server.shutdown()
        serving.join()
    return 0
