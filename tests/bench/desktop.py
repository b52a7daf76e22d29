"""Benchmark of the time from an action to the settled screenshot: embedded desktop against OSWorld's guest server.

Both sides perform the same actions in the same editor on X servers of the same size, and use the same rule: a screen is
settled when it has not changed for `settle_quiet_s`. OSWorld's guest server receives the requests of OSWorld's client,
without the client's pause of 2 s per step. PyAutoGUI's pause after each call is part of an action.
Prints one JSON line; `ratio` is the median time of OSWorld's guest server divided by that of the embedded desktop, and
`ratio_without_pyautogui_pause` the same without PyAutoGUI's pause. `processor_ms` is the processor time of a step of
the embedded desktop, with its X server, its editor and the part of this program; `theirs_processor_ms` the same of
OSWorld's side, and `processor_ratio` the second divided by the first.

    python tests/bench/desktop.py [--osworld FOLDER] [--rounds N] [--desktops N]

FOLDER contains OSWorld's guest server (`main.py`). The server runs in a virtual environment under .cache/, created if
it is missing, and without network: this program starts a second copy of itself inside bubblewrap and sends it commands.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil
from PIL import Image

from deskrl.core.config import DesktopConfig

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = REPOSITORY / ".cache" / "bench-osworld"
REQUIREMENTS = ["flask", "requests", "lxml", "numpy", "Pillow<11", "python3-xlib==0.15", "PyAutoGUI==0.9.54"]
SYSTEM_PYTHON = "/usr/bin/python3"
MODULES = {"ensurepip": "python3-venv", "pyatspi": "python3-pyatspi", "tkinter": "python3-tk"}
"""Modules of the system's Python that OSWorld's server needs, and their Debian packages."""
PROGRAMS = {"Xvfb": "xvfb", "bwrap": "bubblewrap", "mousepad": "mousepad", "openbox": "openbox"}
"""Programs that this benchmark starts, and their Debian packages."""
GUEST_SERVER = "http://127.0.0.1:5000"
WIDTH, HEIGHT = 1280, 720
QUIET_S, LIMIT_S = DesktopConfig().settle_quiet_s, DesktopConfig().settle_timeout_s
POLL_S = 0.02
WARM_UP_ROUNDS = 2
SERVER_WITHOUT_DEBUGGER = """
import runpy, sys, flask
run = flask.Flask.run
flask.Flask.run = lambda app, **options: run(app, host="127.0.0.1")
sys.path.insert(0, ".")
runpy.run_path("main.py", run_name="__main__")
"""
"""Starts OSWorld's server without the debugger that its last line enables, which would slow it down."""
ACTIONS = ("type", "click", "hotkey")
CLICK_AT = ((500, 300), (700, 400))


class EmbeddedSide:
    """Embedded desktop, used through its native interface."""

    def __init__(self, run_root: Path) -> None:
        from deskrl.actor.desktops.embedded import EmbeddedDesktop

        config = DesktopConfig(width=WIDTH, height=HEIGHT, settle_quiet_s=QUIET_S, settle_timeout_s=LIMIT_S)
        self.desktops = (EmbeddedDesktop(config, f"desktop-{number}", run_root) for number in range(1_000_000))
        self.desktop = next(self.desktops)

    async def start(self) -> None:
        await self.desktop.start()
        await self.desktop.launch("mousepad")
        await self.desktop.wait_for_window("mousepad")
        await self.desktop.settle()

    async def step(self, number: int) -> float:
        """Perform an action and return the seconds until its settled screenshot."""
        from deskrl.actor.actions import Action, ActionKind

        x, y = CLICK_AT[number // len(ACTIONS) % 2]
        action = {
            "type": Action(ActionKind.TYPE, text="hello"),
            "click": Action(ActionKind.CLICK, x=x, y=y),
            "hotkey": Action(ActionKind.HOTKEY, keys=("ctrl", "a")),
        }[ACTIONS[number % len(ACTIONS)]]
        started = time.perf_counter()
        await self.desktop.act(action)
        image = await self.desktop.settle()
        assert image.size == (WIDTH, HEIGHT)
        return time.perf_counter() - started

    async def reset_s(self, rounds: int) -> float:
        """Return the median seconds of a reset."""
        return statistics.median([await _timed(self.desktop.reset()) for _ in range(rounds)])

    async def run_at_once(self, num_desktops: int) -> dict[str, float]:
        """Start desktops concurrently, each with an editor; return their number, the time and the memory of each."""
        desktops = [next(self.desktops) for _ in range(num_desktops)]
        available = _available_mb()

        async def start(desktop) -> None:  # type: ignore[no-untyped-def]
            await desktop.start()
            await desktop.launch("mousepad")
            await desktop.wait_for_window("mousepad")

        try:
            started_s = await _timed(asyncio.gather(*map(start, desktops)))
            num_alive = sum(await asyncio.gather(*(desktop.is_alive() for desktop in desktops)))
            each_mb = (available - _available_mb()) / num_desktops
        finally:
            await asyncio.gather(*(desktop.close() for desktop in desktops))
        return {"desktops_at_once": num_alive, "start_together_s": round(started_s, 2), "each_mb": round(each_mb)}


async def _timed(operation) -> float:  # type: ignore[no-untyped-def]
    started = time.perf_counter()
    await operation
    return time.perf_counter() - started


def _processor_s(process: psutil.Process, excluded: int = 0) -> float:
    """Return the processor time of a process and of all below it, apart from the tree of the process `excluded`."""
    times = process.cpu_times()
    own_s = times.user + times.system + times.children_user + times.children_system
    return own_s + sum(_processor_s(child, excluded) for child in process.children() if child.pid != excluded)


def _available_mb() -> float:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1024


class OsworldSide:
    """Copy of this program that drives OSWorld's guest server; it performs one step per line of input."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.pid = process.pid
        self._stdin: IO[str] = process.stdin
        self._stdout: IO[str] = process.stdout
        self._read()

    def step(self, number: int, *, with_pause: bool) -> float:
        """Perform an action and return the seconds until its settled screenshot."""
        print(number, int(with_pause), file=self._stdin, flush=True)
        return self._read()

    def _read(self) -> float:
        line = self._stdout.readline()
        if not line:
            raise SystemExit("OSWorld's guest server did not start (hint: see its output above)")
        return float(line)


@contextmanager
def osworld(folder: Path) -> Iterator[OsworldSide]:
    """Run OSWorld's guest server inside bubblewrap until the end of the block."""
    check_requirements()
    if not ENVIRONMENT.exists():
        make_environment()
    with tempfile.TemporaryDirectory(prefix="deskrl-bench-") as scratch:
        command = ["bwrap", "--die-with-parent", "--unshare-pid", "--unshare-net", "--dev-bind", "/", "/"]
        command += ["--proc", "/proc", "--tmpfs", "/tmp", "--bind", scratch, "/run", *visible_arguments(folder)]
        command += ["--setenv", "HOME", "/tmp", "--setenv", "DISPLAY", ":0", "--", sys.executable, __file__]
        process = subprocess.Popen(
            [*command, "--drive", str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            yield OsworldSide(process)
        finally:
            process.kill()
            process.communicate()


def visible_arguments(folder: Path) -> list[str]:
    """Return bubblewrap arguments that show what the copy of this program needs, where /tmp or /run would hide it."""
    paths = {REPOSITORY, folder.resolve(), Path(sys.prefix), Path(sys.base_prefix)}
    hidden = sorted(path for path in paths if path.is_relative_to("/tmp") or path.is_relative_to("/run"))
    return [word for path in hidden for word in ("--bind", str(path), str(path))]


def check_requirements() -> None:
    """Exit with one line that names all Debian packages that are missing."""
    missing = {package for program, package in PROGRAMS.items() if shutil.which(program) is None}
    if shutil.which(SYSTEM_PYTHON) is None:
        missing |= {"python3", *MODULES.values()}
    else:
        code = f"from importlib.util import find_spec; print(*(m for m in {list(MODULES)} if find_spec(m) is None))"
        found = subprocess.run([SYSTEM_PYTHON, "-c", code], check=True, capture_output=True, text=True)
        missing |= {MODULES[module] for module in found.stdout.split()}
    if missing:
        raise SystemExit(
            f"Debian packages are not installed: {', '.join(sorted(missing))} "
            f"(hint: apt-get install {' '.join(sorted(missing))})"
        )


def make_environment() -> None:
    """Create a virtual environment of the system's Python, which has pyatspi and tkinter (Debian packages)."""
    try:
        subprocess.run([SYSTEM_PYTHON, "-m", "venv", "--system-site-packages", str(ENVIRONMENT)], check=True)
        pip = [str(ENVIRONMENT / "bin" / "pip"), "install", "--quiet", *REQUIREMENTS]
        subprocess.run(pip, check=True, stdout=sys.stderr)
    except (OSError, subprocess.CalledProcessError):
        subprocess.run(["rm", "-rf", str(ENVIRONMENT)], check=True)
        raise SystemExit(
            "the environment of OSWorld's server was not created (hint: see the output of venv and pip above)"
        ) from None


def drive(folder: Path) -> None:
    """Start a desktop with OSWorld's server inside bubblewrap, then perform one step per line of standard input."""
    environment = os.environ | {"PATH": f"{ENVIRONMENT}/bin:{os.environ['PATH']}", "NO_AT_BRIDGE": "1"}
    # If this program exists, PyAutoGUI takes screenshots in its own process, its fastest mode, as on OSWorld's image.
    (ENVIRONMENT / "bin" / "gnome-screenshot").unlink(missing_ok=True)
    (ENVIRONMENT / "bin" / "gnome-screenshot").symlink_to("/bin/true")
    Path("/tmp/.gtkrc-2.0").touch()
    settings = Path("/tmp/.config/gtk-3.0/settings.ini")
    settings.parent.mkdir(parents=True)
    settings.write_text("[Settings]\ngtk-cursor-blink=false\n")

    def spawn(*command: str, cwd: Path = Path("/tmp")) -> None:
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=cwd)

    spawn("Xvfb", ":0", "-screen", "0", f"{WIDTH}x{HEIGHT}x24", "-nolisten", "tcp", "-ac")
    # The server writes to its own folder, so it runs from a copy.
    copy = Path("/tmp/deskrl-osworld-server")
    subprocess.run(["cp", "-r", "--no-preserve=mode", str(folder), str(copy)], check=True)
    subprocess.run(["touch", "/tmp/.Xauthority"], check=True)
    while not Path("/tmp/.X11-unix/X0").exists():
        time.sleep(0.05)
    spawn("openbox")
    spawn("mousepad")
    spawn("python", "-c", SERVER_WITHOUT_DEBUGGER, cwd=copy)
    for _ in range(300):
        try:
            settled_png()
            break
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    else:
        raise SystemExit("OSWorld's guest server does not respond")
    print(0, flush=True)
    for line in sys.stdin:
        number, with_pause = map(int, line.split())
        print(osworld_step(number, with_pause=bool(with_pause)), flush=True)


def osworld_step(number: int, *, with_pause: bool) -> float:
    """Send an action as OSWorld's client does, poll until the screen is settled, and return the seconds."""
    x, y = CLICK_AT[number // len(ACTIONS) % 2]
    call = {
        "type": "pyautogui.write('hello')",
        "click": f"pyautogui.click({x}, {y})",
        "hotkey": "pyautogui.hotkey('ctrl', 'a')",
    }[ACTIONS[number % len(ACTIONS)]]
    pause = "" if with_pause else "pyautogui.PAUSE = 0; "
    code = f"import pyautogui; import time; pyautogui.FAILSAFE = False; {pause}{call}"
    started = time.perf_counter()
    body = json.dumps({"command": ["python", "-c", code], "shell": False}).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{GUEST_SERVER}/execute", body, headers)) as response:
        done = json.load(response)
    if done["returncode"] != 0:
        raise SystemExit(f"the action failed: {done}")
    image = Image.open(io.BytesIO(settled_png())).convert("RGB")
    assert image.size == (WIDTH, HEIGHT)
    return time.perf_counter() - started


def settled_png() -> bytes:
    """Poll screenshots until they settle, by the rule of `deskrl.actor.guest.framebuffer`; return the last one."""
    started = quiet_since = time.perf_counter()
    last = get_png()
    while True:
        now = time.perf_counter()
        if now - quiet_since >= QUIET_S or now - started >= LIMIT_S:
            return last
        time.sleep(min(POLL_S, QUIET_S - (now - quiet_since)))
        current = get_png()
        if current != last:
            last, quiet_since = current, time.perf_counter()


def get_png() -> bytes:
    """Return a screenshot as PNG."""
    with urllib.request.urlopen(f"{GUEST_SERVER}/screenshot") as response:
        data: bytes = response.read()
    return data


async def compare(folder: Path, rounds: int, num_desktops: int) -> dict[str, object]:
    """Measure everything and return the result; a round is every action once on each side, in alternation."""
    me = psutil.Process()
    times: dict[str, list[float]] = {"ours": [], "theirs": [], "theirs_without_pause": []}
    with tempfile.TemporaryDirectory(prefix="deskrl-bench-") as scratch, osworld(folder) as theirs:
        ours = EmbeddedSide(Path(scratch) / "desktops")
        try:
            await ours.start()
            for number in range(len(ACTIONS) * (rounds + WARM_UP_ROUNDS)):
                if number == len(ACTIONS) * WARM_UP_ROUNDS:
                    before = _processor_s(me, theirs.pid), _processor_s(psutil.Process(theirs.pid))
                step = {
                    "ours": await ours.step(number),
                    "theirs": theirs.step(number, with_pause=True),
                    "theirs_without_pause": theirs.step(number, with_pause=False),
                }
                if number >= len(ACTIONS) * WARM_UP_ROUNDS:
                    for side, seconds in step.items():
                        times[side].append(seconds)
            ours_s, theirs_s = (
                after - start
                for after, start in zip(
                    (_processor_s(me, theirs.pid), _processor_s(psutil.Process(theirs.pid))), before, strict=True
                )
            )
            reset_s = await ours.reset_s(rounds)
            many = await ours.run_at_once(num_desktops)
        finally:
            await ours.desktop.close()
    num_steps = len(ACTIONS) * rounds
    median = {side: statistics.median(seconds) for side, seconds in times.items()}
    return {
        "bench": "desktop",
        "ratio": round(median["theirs"] / median["ours"], 2),
        "ratio_without_pyautogui_pause": round(median["theirs_without_pause"] / median["ours"], 2),
        **{f"{side}_ms": round(1000 * seconds, 1) for side, seconds in median.items()},
        "processor_ms": round(1000 * ours_s / num_steps, 1),
        "theirs_processor_ms": round(1000 * theirs_s / (2 * num_steps), 1),
        "processor_ratio": round(theirs_s / 2 / ours_s, 2),
        "of_which_quiet_ms": 1000 * QUIET_S,
        "reset_ms": round(1000 * reset_s),
        **many,
    }


def main() -> None:
    """Parse the arguments, measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("DESKRL_OSWORLD", str(REPOSITORY.parent / "shared" / "osworld" / "guest_server"))
    parser.add_argument("--osworld", type=Path, default=Path(default), help="folder of OSWorld's guest server")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--desktops", type=int, default=16, help="number of concurrent desktops")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        drive(options.drive)
        return
    if not (options.osworld / "main.py").is_file():
        raise SystemExit(
            f"{options.osworld}/main.py: not found (hint: --osworld names the folder of OSWorld's guest server)"
        )
    print(json.dumps(asyncio.run(compare(options.osworld, options.rounds, options.desktops))))


if __name__ == "__main__":
    main()
