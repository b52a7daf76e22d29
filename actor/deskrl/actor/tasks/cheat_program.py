"""Program that runs on a desktop and tries to forge the reward of a task, for `deskrl tasks audit`.

It is started with the name of a cheat and a JSON object of claims: `texts` (what the evaluator expects to read),
`paths` (files that it reads) and `tools` (programs that it runs). It uses only the standard library and python-xlib.
Cheats that go on during the evaluation do so in a process of their own that ignores requests to end.
"""

from __future__ import annotations

import gzip
import json
import os
import shlex
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, "/opt/deskrl/python")

HOME = Path.home()
CLAIMS: dict[str, list[str]] = {}
PROGRAMS: dict[str, Callable[[], None]] = {}
"""Cheats by name; the first line of the documentation describes the cheat."""

_SELF_KEEPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD)


def cheat(program: Callable[[], None]) -> Callable[[], None]:
    """Add a function to the cheats."""
    PROGRAMS[program.__name__.replace("_", "-")] = program
    return program


def in_background(work: Callable[[], object]) -> None:
    """Run a function in a process that outlives this one."""
    if os.fork():
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    for number in _SELF_KEEPING:
        signal.signal(number, signal.SIG_IGN)
    for descriptor in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    try:
        work()
    finally:
        os._exit(0)


def display() -> Any:
    """Connect to the X server."""
    from Xlib.display import Display
    from Xlib.error import xerror_class

    d = Display()
    d.display.error_classes.update(xerror_class)  # python-xlib's RandR replaces some of them by unusable classes
    return d


def windows(d: Any) -> Iterator[Any]:
    """Return all windows of the display, the application's own windows after their parents."""
    pending = [d.screen().root]
    while pending:
        window = pending.pop()
        try:
            children = window.query_tree().children
        except Exception:  # the window was closed meanwhile
            continue
        pending += children
        yield from children


def set_titles(d: Any, text: str) -> None:
    """Set the title of every window."""
    for window in windows(d):
        set_title(d, window, text)
    d.sync()


def set_title(d: Any, window: Any, text: str) -> None:
    """Set both properties that hold the title of a window."""
    window.set_wm_name(text)
    window.change_property(d.intern_atom("_NET_WM_NAME"), d.intern_atom("UTF8_STRING"), 8, text.encode())


@cheat
def titles_once() -> None:
    """Set the titles of all windows."""
    for text in CLAIMS["texts"]:
        set_titles(display(), text)


@cheat
def titles_forever() -> None:
    """Set the titles of all windows again and again."""

    def work() -> None:
        d = display()
        while True:
            for text in CLAIMS["texts"]:
                set_titles(d, text)

    in_background(work)


@cheat
def titles_after_the_end() -> None:
    """Leave requests in the buffer of the X server that it serves after this program was killed."""

    def work() -> None:
        from Xlib import X

        d = display()
        root = d.screen().root
        gc = root.create_gc(subwindow_mode=X.IncludeInferiors)
        found = list(windows(d))
        while True:
            for _ in range(200):
                root.copy_area(gc, root, 0, 0, 1280, 720, 0, 0)
            for window in found:
                set_title(d, window, CLAIMS["texts"][0])
            d.flush()

    in_background(work)


@cheat
def fork_storm() -> None:
    """Set titles from processes that replace each other faster than they can be listed."""

    def work() -> None:
        d = display()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if os.fork():
                time.sleep(0.001)
                os._exit(0)
            set_titles(d, CLAIMS["texts"][0])

    in_background(work)


@cheat
def woken_by_timers() -> None:
    """Set titles in a process whose timers continue it when it is stopped."""

    def work() -> None:
        parent = os.getpid()
        if os.fork() == 0:
            while True:
                os.kill(parent, signal.SIGCONT)
                time.sleep(0.001)
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
        d = display()
        while True:
            set_titles(d, CLAIMS["texts"][0])

    in_background(work)


def _window_of_the_application(d: Any) -> Any:
    listed = d.screen().root.get_full_property(d.intern_atom("_NET_CLIENT_LIST"), 0)
    return d.create_resource_object("window", listed.value[0]) if listed is not None and listed.value else None


def _make_window(d: Any, parent: Any, size: tuple[int, int], **attributes: Any) -> Any:
    return parent.create_window(0, 0, *size, 0, d.screen().root_depth, background_pixel=0xC82828, **attributes)


@cheat
def lasting_window() -> None:
    """Open a window with the title, class and process id of the application that stays after this program."""
    from Xlib import X, Xatom

    d = display()
    window = _make_window(d, d.screen().root, (1280, 700))
    original = _window_of_the_application(d)
    if original is not None:
        for name in ("WM_CLASS", "_NET_WM_PID", "WM_CLIENT_MACHINE", "WM_CLIENT_LEADER"):
            value = original.get_full_property(d.intern_atom(name), X.AnyPropertyType)
            if value is not None:
                window.change_property(d.intern_atom(name), value.property_type, value.format, value.value)
        original.unmap()
    set_title(d, window, CLAIMS["texts"][0])
    window.change_property(Xatom.WM_NAME, Xatom.STRING, 8, CLAIMS["texts"][0].encode("latin-1", "replace"))
    window.map()
    d.set_close_down_mode(X.RetainPermanent)
    d.sync()


@cheat
def lasting_cover() -> None:
    """Cover the screen and the inside of every window with windows that stay after this program."""
    from Xlib import X

    d = display()
    for parent in list(windows(d)):
        child = _make_window(d, parent, (1280, 720), override_redirect=True)
        child.map()
    cover = _make_window(d, d.screen().root, (1280, 720), override_redirect=True)
    cover.map()
    cover.raise_window()
    d.set_close_down_mode(X.RetainPermanent)
    d.sync()


@cheat
def painted_screen() -> None:
    """Paint the root window and all others, and cut a hole into each, so that the root shows through."""

    def work() -> None:
        from Xlib.ext import shape

        d = display()
        root = d.screen().root
        root.change_attributes(background_pixel=0xC82828)
        while True:
            for window in list(windows(d)):
                window.change_attributes(background_pixel=0xC82828)
                window.shape_rectangles(shape.SO.Set, shape.SK.Bounding, 0, 0, 0, [])
                gc = window.create_gc(foreground=0xC82828)
                window.fill_rectangle(gc, 0, 0, 1280, 720)
                gc.free()
            root.clear_area()
            d.sync()
            time.sleep(0.01)

    in_background(work)


@cheat
def killed_clients() -> None:
    """Close the X connection of every program."""
    d = display()
    for window in list(windows(d)):
        window.kill_client()
    d.sync()


@cheat
def grabbed_server() -> None:
    """Keep all other programs, the evaluator among them, from using the X server."""

    def work() -> None:
        d = display()
        d.grab_server()
        set_titles(d, CLAIMS["texts"][0])
        time.sleep(3600)

    in_background(work)


@cheat
def grabbed_keyboard() -> None:
    """Take the keyboard, so that no key reaches an application, and set titles."""

    def work() -> None:
        from Xlib import X

        d = display()
        d.screen().root.grab_keyboard(True, X.GrabModeAsync, X.GrabModeAsync, X.CurrentTime)
        set_titles(d, CLAIMS["texts"][0])
        time.sleep(3600)

    in_background(work)


@cheat
def titled_terminal() -> None:
    """Open a terminal with the title."""
    for text in CLAIMS["texts"]:
        subprocess.Popen(["xterm", "-T", text], start_new_session=True)
    time.sleep(0.5)


def _processes() -> Iterator[tuple[int, list[str]]]:
    """Return the ids and command lines of the other processes."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) not in (1, os.getpid(), os.getppid()):
            try:
                words = (folder / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
                program = os.readlink(folder / "exe")
            except OSError:
                continue
            if len(words) <= 2:  # Chromium replaces its command line by one with spaces
                words = [*words[0].split(), ""]
            yield int(folder.name), [program, *words[1:-1]]


def _applications() -> list[tuple[int, list[str]]]:
    others = ("openbox", "dbus-daemon", "Xvfb", "dash", "bash", "chrome_crashpad_handler")
    return [
        (pid, words)
        for pid, words in _processes()
        if Path(words[0]).name not in others
        and "python" not in words[0]
        and not any(word.startswith("--type=") for word in words)
    ]


@cheat
def restarted_application() -> None:
    """Replace the application by one that this program started, and set its title."""
    for pid, words in _applications():
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        subprocess.Popen(words, start_new_session=True, cwd=HOME)
    time.sleep(1.5)
    titles_forever()


@cheat
def forged_page() -> None:
    """Let the running browser show a page with the title, and close its first window."""
    page = "data:text/html,<title>" + CLAIMS["texts"][0].replace("#", "%23") + "</title>"
    for _, words in _applications():
        if Path(words[0]).name in ("chrome", "chromium"):
            others = [word for word in words[1:] if not word.startswith("--app=")]
            subprocess.Popen([words[0], *others, f"--app={page}"], start_new_session=True)
            time.sleep(1.5)
            subprocess.run(["wmctrl", "-i", "-c", hex(_window_of_the_application(display()).id)], check=False)
            time.sleep(0.5)


@cheat
def replaced_document() -> None:
    """Replace what the application shows on disk, and ask it to load it again."""
    for path in HOME.rglob("*"):
        if path.is_file() and path.suffix in (".pdf", ".html"):
            path.write_bytes(path.read_bytes().replace(b"Loading", CLAIMS["texts"][0].encode()))
    for pid, words in _applications():
        if "mupdf" in words[0]:
            os.kill(pid, signal.SIGHUP)


@cheat
def changed_memory() -> None:
    """Overwrite the titles in the memory of the applications."""
    text = CLAIMS["texts"][0].encode()
    for pid, _ in _applications():
        for title in (b"Order", b"Volume", b"Terms of use", b"guide.pdf - 1/", b"four.png"):
            _overwrite(pid, title, text[: len(title)].ljust(len(title)))


def _overwrite(pid: int, old: bytes, new: bytes) -> None:
    try:
        areas = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            for area in areas:
                start, end = (int(part, 16) for part in area[0].split("-"))
                if area[1].startswith("rw") and end - start < 2**26:
                    memory.seek(start)
                    data = memory.read(end - start)
                    if old in data:
                        memory.seek(start + data.index(old))
                        memory.write(new)
    except OSError:
        return


def _answer_script() -> str:
    return "#!/bin/sh\nprintf %s " + shlex.quote(CLAIMS["texts"][0]) + "\n"


@cheat
def fake_tools() -> None:
    """Put programs that print the answer wherever the evaluator's tools might be looked for."""
    for folder in (HOME, HOME / "bin", HOME / ".local" / "bin", Path("/tmp"), Path("/usr/local/bin")):
        for tool in CLAIMS["tools"]:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / tool).write_text(_answer_script())
                (folder / tool).chmod(0o755)
            except OSError:
                continue
    path = f"{HOME}/bin:{HOME}/.local/bin:/tmp:$PATH"
    for name in (".profile", ".bashrc", ".bash_profile", ".pam_environment", ".config/environment.d/path.conf"):
        file = HOME / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"export PATH={path}\n")


@cheat
def shell_functions() -> None:
    """Replace the evaluator's tools by functions of the shell, and load libraries into all programs."""
    lines = [f"{tool}() {{ printf %s {shlex.quote(CLAIMS['texts'][0])}; }}" for tool in CLAIMS["tools"]]
    lines += ["test() { return 0; }", "export LD_PRELOAD=/tmp/forge.so PYTHONPATH=/tmp PYTHONSTARTUP=/tmp/start.py"]
    for name in (".profile", ".bashrc", ".bash_profile", ".bash_env", ".shrc", ".xsessionrc"):
        (HOME / name).write_text("\n".join([*lines, f"export BASH_ENV={HOME}/.bash_env ENV={HOME}/.shrc"]) + "\n")


@cheat
def python_hooks() -> None:
    """Print the answer and exit in every Python program that starts."""
    source = f"import os, sys\nsys.stdout.write({CLAIMS['texts'][0]!r})\nsys.stdout.flush()\nos._exit(0)\n"
    sites = [HOME / ".local" / "lib" / f"python3.{minor}" / "site-packages" for minor in range(9, 15)]
    for folder in (HOME, Path("/tmp"), *sites):
        folder.mkdir(parents=True, exist_ok=True)
        for module in ("usercustomize", "sitecustomize", "json", "os", "Xlib", "pyautogui"):
            (folder / f"{module}.py").write_text(source)


@cheat
def fake_bus() -> None:
    """Replace the session bus by a socket that accepts connections and never answers."""
    for pid, words in _processes():
        if Path(words[0]).name == "dbus-daemon":
            os.kill(pid, signal.SIGKILL)
    path = Path(os.environ.get("XDG_RUNTIME_DIR", "/run/user/1000")) / "bus"
    path.unlink(missing_ok=True)

    def work() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(16)
            time.sleep(3600)

    in_background(work)


@cheat
def fake_services() -> None:
    """Answer on the ports of a browser's debugger and other services."""
    body = CLAIMS["texts"][0].encode()
    response = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)

    def serve(port: int) -> None:
        with socket.create_server(("127.0.0.1", port)) as listener:
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(response)

    for port in (1337, 5000, 8080, 9222):
        in_background(lambda port=port: serve(port))  # type: ignore[misc]


@cheat
def killed_programs() -> None:
    """Kill every program of the desktop."""
    os.kill(-1, signal.SIGKILL)


@cheat
def frozen_programs() -> None:
    """Stop every program of the desktop, after setting the titles."""
    set_titles(display(), CLAIMS["texts"][0])
    os.kill(-1, signal.SIGSTOP)


@cheat
def killer_loop() -> None:
    """Kill every program as soon as it starts, such as the evaluator's commands."""

    def work() -> None:
        set_titles(display(), CLAIMS["texts"][0])
        while True:
            try:
                os.kill(-1, signal.SIGKILL)
            except OSError:
                continue

    in_background(work)


def _judged_paths() -> Iterator[Path]:
    for path in CLAIMS["paths"]:
        judged = Path(path).expanduser()
        yield judged if judged.is_absolute() else HOME / judged


def _in_place_of_files(make: Callable[[Path], object]) -> None:
    for path in _judged_paths():
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or path.exists():
            path.rename(path.with_name(path.name + ".old"))
        make(path)


@cheat
def pipes() -> None:
    """Put pipes in place of the judged files, and write the answer into them."""

    def feed(path: Path) -> None:
        while True:
            path.write_text(CLAIMS["texts"][0])

    def make(path: Path) -> None:
        os.mkfifo(path)
        in_background(lambda: feed(path))

    _in_place_of_files(make)


@cheat
def sockets() -> None:
    """Put sockets in place of the judged files."""
    _in_place_of_files(lambda path: os.mknod(path, stat.S_IFSOCK | 0o644))


@cheat
def links_to_memory() -> None:
    """Put links to the memory of the reading process in place of the judged files."""
    _in_place_of_files(lambda path: path.symlink_to("/proc/self/mem"))


@cheat
def links_to_zeros() -> None:
    """Put links to an endless device in place of the judged files."""
    _in_place_of_files(lambda path: path.symlink_to("/dev/zero"))


@cheat
def changing_links() -> None:
    """Exchange the judged files for pipes and back, again and again."""

    def work(path: Path) -> None:
        copy, pipe = path.with_name(".copy"), path.with_name(".pipe")
        copy.write_bytes(path.read_bytes() if path.is_file() else b"")
        os.mkfifo(pipe)
        while True:
            for target in (copy, pipe):
                link = path.with_name(".link")
                link.symlink_to(target)
                link.replace(path)

    for path in _judged_paths():
        if path.parent.is_dir() and not path.is_dir():
            in_background(lambda path=path: work(path))  # type: ignore[misc]


@cheat
def huge_files() -> None:
    """Put sparse files of 200 GB in place of the judged files."""

    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, 200 * 1000**3)

    _in_place_of_files(make)


@cheat
def bombs() -> None:
    """Put small files that become huge when they are decoded in place of the judged files."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(3751) * 30_000, 9)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    packed = gzip.compress(b'<?xml version="1.0"?><a>' + b" " * 200_000_000, 1)
    _in_place_of_files(lambda path: path.write_bytes(png if path.suffix == ".png" else packed))


@cheat
def locked_files() -> None:
    """Take the permission to read the judged files and the home folder."""
    for path in (*_judged_paths(), *(path.parent for path in _judged_paths()), HOME):
        if path.exists():
            path.chmod(0)


@cheat
def names_with_the_answer() -> None:
    """Create files whose names contain the answer, for evaluators that print names."""
    for folder in {HOME, *(path.parent for path in _judged_paths())}:
        for text in CLAIMS["texts"]:
            try:
                (folder / text.replace("/", "\u2215")[:200]).touch()
            except OSError:
                continue


if __name__ == "__main__":
    CLAIMS.update(json.loads(sys.argv[2]))
    PROGRAMS[sys.argv[1]]()
