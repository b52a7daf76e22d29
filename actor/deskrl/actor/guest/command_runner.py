"""Commands and applications inside the desktop, and default applications of files."""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from deskrl.actor.guest.limits import MAX_OUTPUT_BYTES
from deskrl.actor.guest.session import PROGRAMS, Session
from deskrl.actor.guest.session_sandbox import HOME
from deskrl.actor.guest.spawner import SpawnedProgram

if TYPE_CHECKING:
    import configparser

_OUTPUT_FOLDER = "/run"
_APPLICATIONS = (Path("/usr/local/share/applications"), Path("/usr/share/applications"))

_CLEAN_ENVIRONMENT = {"PATH": f"{PROGRAMS}:/usr/bin:/bin", "PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1"}
"""Changes to the environment after the setup; PYTHONSAFEPATH is known to Python 3.11 and later."""
_ROOM_ENVIRONMENT = {"DESKRL_PYTHON_FLAGS": "-I"}
"""Further changes after the end of the session, for the programs `python` and `python3`."""


class NoDefaultApplication(LookupError):
    """No default application is configured for the type of a file."""


class CompletedCommand(NamedTuple):
    """Result of a command that ran to its end."""

    returncode: int
    stdout: str
    stderr: str


class CommandRunner:
    """Runs commands for the actor.

    During the setup, commands run in the session with its environment. After `Session.end_setup` they run in the
    session in a clean environment, because the policy may have put programs and modules into the home. After
    `Session.stop_all_programs` each command runs in a fresh sandbox.

    Args:
        session: session of the desktop.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def run(self, command: str | Sequence[str], *, shell: bool, timeout_s: float) -> CompletedCommand:
        """Run a command to its end.

        The output is written to files instead of pipes, so that processes which the command leaves in the background do
        not delay the result.

        Raises:
            OSError: the command cannot be started.
            subprocess.TimeoutExpired: the command exceeded `timeout_s`; its process group was killed.
        """
        with _output_file() as stdout, _output_file() as stderr:
            program = self._start(command, shell=shell, output=(stdout.fileno(), stderr.fileno()))
            try:
                returncode = program.wait(timeout_s)
            except TimeoutError as error:
                program.kill()
                program.forget()
                raise subprocess.TimeoutExpired(command, timeout_s) from error
            output = [_head(file.fileno()) for file in (stdout, stderr)]
        return CompletedCommand(returncode, *output)

    def launch(self, command: str | Sequence[str], *, shell: bool) -> None:
        """Start a command without waiting for it; raises OSError, also after `Session.stop_all_programs`."""
        if self._session.has_ended:
            raise OSError(errno.ESRCH, "all programs of the desktop were ended")
        self._start(command, shell=shell, output=None).forget()

    def expand(self, path: str) -> str:
        """Expand `~` and environment variables of the desktop's user; relative paths start at the home folder."""
        for name, value in self._session.environment.items():
            path = path.replace(f"${{{name}}}", value).replace(f"${name}", value)
        return posixpath.join(HOME, path.removeprefix("~/")) if path != "~" else HOME

    def open_with_default(self, path: str) -> None:
        """Open a file in its default application (mimeapps.list); raises NoDefaultApplication if it has none."""
        import mimetypes

        files = self._session.files
        name = posixpath.basename(path)
        mime_type = "inode/directory" if files.is_folder(path) else mimetypes.guess_type(name)[0] or "text/plain"
        try:
            defaults = _parse_ini(files.read(self.expand("~/.config/mimeapps.list")).decode("utf-8", "replace"))
        except FileNotFoundError:
            defaults = _parse_ini("")
        entry = defaults.get("Default Applications", mime_type, fallback="").split(";")[0]
        for folder in _APPLICATIONS:
            if entry and "/" not in entry and (folder / entry).is_file():
                line = _parse_ini((folder / entry).read_text(encoding="utf-8")).get("Desktop Entry", "Exec")
                words = [word for word in shlex.split(line) if not word.startswith("%")]
                self.launch([*words, path], shell=False)
                return
        raise NoDefaultApplication(f"no default application for files of type {mime_type}")

    def _start(self, command: str | Sequence[str], *, shell: bool, output: tuple[int, int] | None) -> SpawnedProgram:
        session = self._session
        words = self._words(command, shell=shell)
        environment = session.environment
        if session.has_ended:
            words = session.box.room_command(_isolated(words))
            environment = environment | _CLEAN_ENVIRONMENT | _ROOM_ENVIRONMENT
        elif session.programs.is_setup_complete:
            environment = environment | _CLEAN_ENVIRONMENT
        in_session = not session.has_ended or session.box.has_room_inside
        return session.spawner.spawn(words, environment, folder=HOME, output=output, in_session=in_session)

    def _words(self, command: str | Sequence[str], *, shell: bool) -> list[str]:
        if shell:
            return ["/bin/sh", "-c", *([command] if isinstance(command, str) else command)]
        words = shlex.split(command) if isinstance(command, str) else command
        if not words:
            raise OSError(errno.ENOENT, "the command is empty")
        return [self.expand(word) if word.startswith("~/") else word for word in words]


def _isolated(words: list[str]) -> list[str]:
    """Return a command whose Python, if it is one, imports nothing from the home and the working folder."""
    if posixpath.basename(words[0]) in ("python", "python3"):
        return ["/usr/bin/python3", "-I", *words[1:]]
    return words


def _output_file() -> BinaryIO:
    """Return a file without a name, in a folder that programs of the session cannot fill."""
    return open(os.open(_OUTPUT_FOLDER, os.O_TMPFILE | os.O_RDWR, 0o600), "r+b", buffering=0)


def _head(descriptor: int) -> str:
    return os.pread(descriptor, MAX_OUTPUT_BYTES, 0).decode("utf-8", "replace")


def _parse_ini(text: str) -> configparser.RawConfigParser:
    import configparser

    parser = configparser.RawConfigParser(delimiters=("=",), strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # keys are case-sensitive in these files
    with contextlib.suppress(configparser.Error):
        parser.read_string(text)
    return parser
