"""Entry point of the guest server: starts the desktop session, then serves requests.

Usage: `python -m deskrl.actor.guest OPTIONS`, where OPTIONS is a JSON object with these keys:

    listener          descriptor of the listening socket, or instead:
    handoff_socket    path of a Unix socket from which the listening socket is received, or instead:
    port              TCP port to listen on
    width, height     screen size in pixels
    max_processes     process limit of the session; null if a control group of the host enforces it
    max_data_bytes    memory limit of each process; null if a control group of the host enforces it
    max_x_data_bytes  memory limit of the X server
    max_file_bytes    size limit of files that are read
    group_fds         open `cgroup.procs` files of the control groups of the session's programs
    session_user_id   user of the session, if the guest server runs as root in a container; missing or null: the session
                      runs in a nested sandbox

The sandbox ends with this process.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

from deskrl.actor.guest.limits import NUM_RESERVED_PROCESSES
from deskrl.actor.guest.seccomp import install_seccomp_filter
from deskrl.actor.guest.session import Session
from deskrl.actor.guest.session_keyring import join_new_keyring
from deskrl.actor.guest.session_sandbox import NestedSandbox, SeparateUser
from deskrl.actor.guest.spawner import ProgramLimits


def main() -> None:
    """Start the session and serve requests forever."""
    options = json.loads(sys.argv[1])
    sys.path[:] = [folder for folder in sys.path if folder not in ("", os.getcwd())]
    max_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))  # see `ProgramLimits`
    join_new_keyring()
    install_seccomp_filter()
    session = _start_session(options)
    # Imported here: while the X server starts, and after the spawner, a copy of this process, was forked.
    from deskrl.actor.guest.server import serve

    session.start_programs(
        ProgramLimits(options["max_processes"], options["max_data_bytes"]), options["max_file_bytes"]
    )
    serve(session, options)


def _start_session(options: dict[str, Any]) -> Session:
    max_processes = options["max_processes"]
    user_id = options.get("session_user_id")
    if user_id is None and max_processes is not None:
        # The kernel counts the guest server's own threads as well. Programs must not be able to use up all of them.
        resource.setrlimit(resource.RLIMIT_NPROC, (max_processes + NUM_RESERVED_PROCESSES,) * 2)
    box = NestedSandbox(tuple(options.get("group_fds", ()))) if user_id is None else SeparateUser(user_id)
    return Session(options["width"], options["height"], box, options["max_x_data_bytes"])


if __name__ == "__main__":
    main()
