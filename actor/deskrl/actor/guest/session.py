"""Desktop session: X server, home folder, message bus and window manager, behind a boundary of the guest server.

The processes are never stopped individually because they end with the sandbox.
"""

from __future__ import annotations

from pathlib import Path

from deskrl.actor.guest.guest_files import GuestFiles
from deskrl.actor.guest.processes import SetupPrograms
from deskrl.actor.guest.session_sandbox import FRAMEBUFFER_FOLDER, HOME, RUNTIME, SESSION, SessionBox
from deskrl.actor.guest.spawner import ProgramLimits, SpawnedProgram, Spawner
from deskrl.actor.guest.watchdog import watch

DISPLAY = ":0"
FRAMEBUFFER_FILE = FRAMEBUFFER_FOLDER / "Xvfb_screen0"
PROGRAMS = Path(__file__).parent / "bin"
"""Folder of programs that replace those of the distribution."""
_HOME_TEMPLATE = Path(__file__).parent / "home"
_WINDOW_MANAGER_FILE = Path(__file__).parent / "openbox.xml"
_TERMINAL_WINDOW_MANAGER_FILE = Path(__file__).parent / "openbox_terminal.xml"
_USER_FOLDERS = ("Desktop", "Documents", "Downloads", "Pictures")
_POLL_S = 0.005
_END_TIMEOUT_S = 10.0


class Session:
    """Session of one desktop. The X server starts at once, the other programs in `start_programs`.

    Args:
        width: screen width in pixels.
        height: screen height in pixels.
        box: boundary of the session.
        max_x_data_bytes: memory limit of the X server, which programs make grow.
    """

    def __init__(self, width: int, height: int, box: SessionBox, max_x_data_bytes: int | None) -> None:
        self.box = box
        self.environment = _environment()
        self.has_ended = False
        self.spawner = Spawner()
        screen = ["-screen", "0", f"{width}x{height}x24", "-fbdir", str(FRAMEBUFFER_FOLDER), "-displayfd", "1"]
        options = ["-nolisten", "tcp", "-noreset", "-ac", "-r", "-s", "0"]
        box.start(["Xvfb", DISPLAY, *screen, *options], ProgramLimits(None, max_x_data_bytes))

    def start_programs(self, limits: ProgramLimits, max_file_bytes: int) -> None:
        """Wait for the X server and start the message bus and the window manager.

        Args:
            limits: resource limits of the session's programs.
            max_file_bytes: size limit of files that are read.
        """
        self.spawner.set_entry(self.box.wait_until_ready(limits))
        self.files = GuestFiles(self.box.root_fd, max_file_bytes, self.box.file_user_id)
        self.programs = SetupPrograms(self.box)
        parts = {**self.box.parts(), "the spawner": self.spawner.part()}
        watch(parts, lambda name: name == SESSION and self.has_ended)
        self._make_home()
        bus = self.environment["DBUS_SESSION_BUS_ADDRESS"]
        self._spawn(["dbus-daemon", "--session", "--nofork", "--nopidfile", f"--address={bus}"])
        self._window_manager = self._start_window_manager(_WINDOW_MANAGER_FILE)

    def check_window_manager(self) -> None:
        """Sleep briefly while openbox starts; raises RuntimeError if it has exited."""
        try:
            status = self._window_manager.wait(_POLL_S)
        except TimeoutError:
            return
        raise RuntimeError(f"openbox exited with status {status}")

    def allow_terminal(self) -> None:
        """Replace the window manager by one that opens a terminal at Ctrl+Alt+T; raises TimeoutError."""
        replaced = self._window_manager
        self._window_manager = self._start_window_manager(_TERMINAL_WINDOW_MANAGER_FILE, "--replace")
        replaced.wait(_END_TIMEOUT_S)  # it would be taken for the new one, or get its keys

    def end_setup(self) -> None:
        """Remember the processes that exist now as those of the setup."""
        self.programs.remember()

    def stop_policy_programs(self) -> None:
        """Kill the processes that the policy started; raises RuntimeError before `end_setup`, and TimeoutError."""
        if not self.programs.is_setup_complete:
            raise RuntimeError("the setup has not ended")
        if not self.has_ended:
            self.programs.kill_others(_END_TIMEOUT_S)

    def stop_all_programs(self) -> None:
        """Kill all processes of the session; raises TimeoutError."""
        self.has_ended = True
        self.box.end()

    def _start_window_manager(self, configuration: Path, *options: str) -> SpawnedProgram:
        # The configuration is not in the home, where the policy could add a key that opens a terminal.
        return self._spawn(["openbox", "--sm-disable", "--config-file", str(configuration), *options])

    def _spawn(self, command: list[str]) -> SpawnedProgram:
        return self.spawner.spawn(command, self.environment, folder=HOME)

    def _make_home(self) -> None:
        for path in _HOME_TEMPLATE.rglob("*"):
            if path.is_file():
                self.files.write(f"{HOME}/{path.relative_to(_HOME_TEMPLATE)}", path.read_bytes())
        for folder in _USER_FOLDERS:
            self.files.make_folders(f"{HOME}/{folder}")


def _environment() -> dict[str, str]:
    """Return the environment of all programs in the desktop."""
    return {
        "DISPLAY": DISPLAY,
        "HOME": HOME,
        "USER": "user",
        "LOGNAME": "user",
        "SHELL": "/bin/bash",
        "PATH": f"{PROGRAMS}:/usr/local/bin:/usr/bin:/bin:/usr/games",
        "LANG": "C.UTF-8",
        "XDG_RUNTIME_DIR": RUNTIME,
        "XDG_SESSION_TYPE": "x11",
        "DBUS_SESSION_BUS_ADDRESS": f"unix:path={RUNTIME}/bus",
        # Settings are kept in a file, and remote file systems and the accessibility bus are disabled: each would
        # need a daemon that the first application starts and waits for.
        "GSETTINGS_BACKEND": "keyfile",
        "GIO_USE_VFS": "local",
        "NO_AT_BRIDGE": "1",
        "GTK_A11Y": "none",
    }
