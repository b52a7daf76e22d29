"""Commands and applications inside the desktop, and which application opens a file. Knows no windows and no routes."""

from __future__ import annotations

import configparser
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_OUTPUT_BYTES = 16 * 1024**2
_APPLICATIONS = (Path("/usr/local/share/applications"), Path("/usr/share/applications"))


class NoApplication(LookupError):
    """No default application opens files of this type."""


@dataclass(frozen=True)
class Completed:
    """A command that ran to its end."""

    returncode: int
    stdout: str
    stderr: str


class Commands:
    """Runs commands in the session's environment, in its home folder."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)

    def run(self, command: str | Sequence[str], *, shell: bool, timeout_s: float) -> Completed:
        """Run to the end; raises subprocess.TimeoutExpired, and then nothing of its process group is left.

        Output goes to files, not pipes: an application that the command leaves in the background holds nothing up.
        """
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            process = self._start(command, shell=shell, stdout=stdout.fileno(), stderr=stderr.fileno())
            try:
                returncode = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
            output = [_head(file.fileno()) for file in (stdout, stderr)]
        return Completed(returncode, *output)

    def launch(self, command: str | Sequence[str], *, shell: bool) -> None:
        """Start without waiting."""
        self._start(command, shell=shell, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def expand(self, path: str) -> Path:
        """`~` and variables as the desktop's user means them; relative paths start at the home folder."""
        for name, value in self._environment.items():
            path = path.replace(f"${{{name}}}", value).replace(f"${name}", value)
        home = Path(self._environment["HOME"])
        return home / path.removeprefix("~/") if path != "~" else home

    def open_with_default(self, path: Path) -> None:
        """Open a file with its default application (mimeapps.list); raises NoApplication if it has none."""
        import mimetypes

        kind = "inode/directory" if path.is_dir() else mimetypes.guess_type(path.name)[0] or "text/plain"
        defaults = _read_ini(self.expand("~/.config/mimeapps.list"))
        entry = defaults.get("Default Applications", kind, fallback="").split(";")[0]
        for folder in _APPLICATIONS:
            if entry and (folder / entry).is_file():
                line = _read_ini(folder / entry).get("Desktop Entry", "Exec")
                words = [word for word in shlex.split(line) if not word.startswith("%")]
                self.launch([*words, str(path)], shell=False)
                return
        raise NoApplication(f"no application opens {kind}")

    def _start(self, command: str | Sequence[str], *, shell: bool, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
        if shell and not isinstance(command, str):
            command = list(command)
        elif not shell:
            words = shlex.split(command) if isinstance(command, str) else command
            command = [str(self.expand(word)) if word.startswith("~/") else word for word in words]
        return subprocess.Popen(
            command,
            shell=shell,
            env=self._environment,
            cwd=self._environment["HOME"],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )


def _head(descriptor: int) -> str:
    return os.pread(descriptor, MAX_OUTPUT_BYTES, 0).decode("utf-8", "replace")


def _read_ini(path: Path) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(delimiters=("=",), strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # keys are case-sensitive in these files
    parser.read(path, encoding="utf-8")
    return parser
