"""The policy's programs cannot reach, impersonate, starve or mislead the guest server that judges them.

Run as root and as an ordinary user, as described in test_desktop_isolation.py.
"""

import asyncio
import contextlib
import os
import shlex
import signal
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from attacks_kit import ON_PROCESSES, ON_SOCKETS, program
from desktop_kit import running_desktop

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.base import Desktop, DesktopError
from deskrl.actor.desktops.kernel_users import own_users
from deskrl.actor.desktops.orphan_cleanup import find_sandbox_processes
from deskrl.actor.guest import landlock
from deskrl.actor.guest.limits import MAX_OUTPUT_BYTES
from deskrl.core.config import DesktopConfig

PYTHON = "/usr/bin/python3"
CLICK = Action(ActionKind.CLICK, x=5, y=5)
RESPONSE_S = 10.0
"""Time in which the guest server must respond while programs try to starve it, on a busy machine."""


async def play(desktop: Desktop, source: str, *, timeout_s: float = 30.0) -> str:
    """Run a Python program of the policy and return its output."""
    result = await desktop.execute([PYTHON, "-c", program(source)], timeout_s=timeout_s)
    return result.stdout.strip() + (result.stderr[-300:] if result.returncode > 0 else "")


async def launch(desktop: Desktop, source: str, marker: str = "~/started") -> None:
    """Start a Python program of the policy that stays alive; it has to create `marker`."""
    await desktop.launch([PYTHON, "-c", program(source)])
    await wait_for_file(desktop, marker)


async def wait_for_file(desktop: Desktop, path: str) -> bytes:
    """Return a file once it exists and is not empty."""
    for _ in range(300):
        try:
            if data := await desktop.read_file(path):
                return data
        except FileNotFoundError:
            pass
        await asyncio.sleep(0.05)
    raise AssertionError(f"{path} was not written")


async def session_programs(desktop: Desktop) -> set[str]:
    """Return id and name of each process of the session's user, except those that list them."""
    lines = (await desktop.execute("ps -u $(id -u) -o pid=,comm=", shell=True)).stdout.splitlines()
    return {line for line in lines if line.split()[1] not in ("ps", "sh")}


STARTED = "open('/home/user/started', 'w').write('yes')"


def test_no_attack_on_processes_and_sockets_succeeds(config: DesktopConfig, run_root: Path, provider: str) -> None:
    attacks = ON_PROCESSES | ON_SOCKETS
    if not landlock.is_available():
        attacks = {name: source for name, source in attacks.items() if "other programs of the session" not in name}
    if provider == "emulated-container":  # docker's seccomp profile and device rules are not emulated
        for name in ("a user namespace", "the guest server's socket"):
            attacks.pop(name)

    async def scenario() -> dict[str, str]:
        async with running_desktop(config, run_root) as desktop:
            await desktop.end_setup()
            assert await play(desktop, "print('out')") == "out"
            outputs = {name: await play(desktop, source) for name, source in attacks.items()}
            assert await desktop.is_alive()
            await desktop.act(CLICK)
            return outputs

    outputs = asyncio.run(scenario())
    assert set(outputs.values()) == {""}, {name: text for name, text in outputs.items() if text}


def test_the_guest_server_is_invisible(config: DesktopConfig, run_root: Path, provider: str) -> None:
    if provider != "embedded":
        pytest.skip("processes of other users are visible in a container")

    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            assert await play(desktop, "print(judges())") == "[]"
            lines = (await desktop.execute(["ps", "ax", "-o", "cmd="])).stdout.splitlines()
            names = {Path(line.split()[0]).name for line in lines}
            assert names <= {"perl", "dbus-daemon", "openbox", "ps"}

    asyncio.run(scenario())


def test_killing_and_stopping_everything_leaves_the_guest_server_working(config: DesktopConfig, run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            await desktop.write_file("~/result.txt", b"done")
            await desktop.end_setup()
            for command in ("kill -STOP -1", "kill -9 -1"):
                await desktop.launch(f"setsid sh -c 'sleep 0.1; {command}'", shell=True)
            await asyncio.sleep(0.5)
            await desktop.act(CLICK)
            assert (await desktop.screenshot()).size == (640, 480)
            assert await desktop.death_cause() is None
            await desktop.stop_policy_programs()
            await desktop.stop_all_programs()
            assert await desktop.read_file("~/result.txt") == b"done"
            assert (await desktop.execute(["cat", "~/result.txt"])).stdout == "done"

    asyncio.run(scenario())


X_ATTACKS = {
    "killing the connections of all clients": """
        from Xlib.display import Display
        """
    + STARTED
    + """
        while True:
            display = Display()
            for client in range(1, 64):
                if client << 21 != display.display.info.resource_id_base:
                    display.create_resource_object("window", client << 21 | 1).kill_client()
                    display.create_resource_object("window", client << 21).kill_client()
            display.sync()
            time.sleep(0.05)
    """,
    "grabbing the server": """
        from Xlib.display import Display
        display = Display()
        display.grab_server()
        display.sync()
        """
    + STARTED
    + """
        time.sleep(1000)
    """,
    "grabbing keyboard and pointer": """
        from Xlib import X
        from Xlib.display import Display
        display = Display()
        root = display.screen().root
        root.grab_keyboard(True, X.GrabModeSync, X.GrabModeSync, X.CurrentTime)
        root.grab_pointer(True, 0, X.GrabModeSync, X.GrabModeSync, 0, 0, X.CurrentTime)
        display.sync()
        """
    + STARTED
    + """
        time.sleep(1000)
    """,
    "nonsense in the properties of the root window": """
        from Xlib import Xatom
        from Xlib.display import Display
        display = Display()
        root = display.screen().root
        while True:
            for name in ("_NET_CLIENT_LIST", "_NET_SUPPORTING_WM_CHECK", "_NET_ACTIVE_WINDOW"):
                root.change_property(display.intern_atom(name), Xatom.STRING, 8, b"x" * 100_000)
            display.sync()
            """
    + STARTED
    + """
            time.sleep(0.01)
    """,
    "windows with huge titles": """
        from Xlib import Xatom
        from Xlib.display import Display
        display = Display()
        for number in range(10):
            window = display.screen().root.create_window(0, 0, 50, 50, 0, display.screen().root_depth)
            title = display.intern_atom("_NET_WM_NAME")
            window.change_property(title, display.intern_atom("UTF8_STRING"), 8, b"x" * 200_000)
            for _ in range(20):
                window.change_property(title, display.intern_atom("UTF8_STRING"), 8, b"x" * 200_000, 2)
            window.map()
            display.sync()
        """
    + STARTED
    + """
        time.sleep(1000)
    """,
    "another screen size": """
        import subprocess
        subprocess.run(["xrandr", "--fb", "320x200"])
        """
    + STARTED
    + """
        time.sleep(1000)
    """,
}
"""Programs that attack the connections of the guest server to the X server, with Xlib; each stays alive."""


@pytest.mark.parametrize("name", X_ATTACKS)
def test_no_x_client_keeps_the_guest_server_from_working(config: DesktopConfig, run_root: Path, name: str) -> None:
    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            await desktop.end_setup()
            code = program(textwrap.dedent(X_ATTACKS[name]))
            await desktop.launch(["python", "-c", code])
            await wait_for_file(desktop, "~/started")
            for operation in (desktop.windows, lambda: desktop.act(CLICK), desktop.settle, desktop.redraw):
                async with asyncio.timeout(RESPONSE_S):
                    await operation()
            assert (await desktop.screenshot()).size == (640, 480)
            await desktop.stop_policy_programs()
            await desktop.stop_all_programs()
            assert (await desktop.execute(["echo", "works"])).stdout == "works\n"

    asyncio.run(scenario())


STARVING = {
    "a fork bomb": "sh -c 'bomb() { bomb | bomb & }; touch ~/started; bomb; sleep 1000'",
    "many busy processes": "sh -c 'for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do (while :; do :; done) & done; "
    "touch ~/started; sleep 1000'",
    "memory": f"{PYTHON} -c \"open('/home/user/started', 'w'); import os\n"
    "for _ in range(20): os.fork()\nx = []\nwhile 1: x.append(b'x' * 2**20)\"",
    "the space of the home and of /tmp": "sh -c 'touch ~/started; cat /dev/zero > ~/full; cat /dev/zero > /tmp/full; "
    "sleep 1000'",
    "shared memory": "sh -c 'touch ~/started; cat /dev/zero > /dev/shm/full; sleep 1000'",
    "threads": f"{PYTHON} -c \"open('/home/user/started', 'w'); import threading, time\nwhile 1:\n try: "
    'threading.Thread(target=time.sleep, args=(1000,)).start()\n except Exception: time.sleep(0.01)"',
    "pixmaps of the X server": "python -c \"open('/home/user/started', 'w'); from Xlib.display import Display\n"
    "d = Display(); r = d.screen().root\nwhile 1:\n p = r.create_pixmap(4000, 4000, 24); g = p.create_gc(); "
    'p.fill_rectangle(g, 0, 0, 4000, 4000); d.sync()"',
    "inotify": f"{PYTHON} -c \"open('/home/user/started', 'w'); import ctypes, time; l = ctypes.CDLL(None)\n"
    'for _ in range(2000): l.inotify_init()\ntime.sleep(1000)"',
}
"""Shell commands that use up a resource."""


@pytest.mark.parametrize("name", STARVING)
def test_programs_cannot_starve_the_guest_server(config: DesktopConfig, run_root: Path, name: str) -> None:
    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            await desktop.write_file("~/result.txt", b"done")
            await desktop.end_setup()
            await desktop.launch(STARVING[name], shell=True)
            await asyncio.sleep(1.5)
            for operation in (desktop.screenshot, lambda: desktop.act(CLICK), desktop.settle):
                async with asyncio.timeout(RESPONSE_S):
                    await operation()
            async with asyncio.timeout(2 * RESPONSE_S):
                await desktop.stop_policy_programs()
                await desktop.stop_all_programs()
                assert await desktop.read_file("~/result.txt") == b"done"
                assert (await desktop.execute("cat ~/result.txt | cat", shell=True)).stdout == "done"
            assert await desktop.death_cause() is None

    asyncio.run(scenario())


EXHAUSTING = {
    "inotify instances": (
        "[None for _ in range(5000) if libc.inotify_init() < 0][:1]",
        "print(libc.inotify_init() >= 0)",
    ),
    "pending signals": (
        """
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN})
[None for _ in range(200_000) if libc.sigqueue(os.getpid(), signal.SIGRTMIN, None)][:1]
""",
        "timer = ctypes.c_void_p(); print(libc.timer_create(0, None, ctypes.byref(timer)) == 0)",
    ),
    "locked memory": (
        """
import mmap
maps = [mmap.mmap(-1, 4096 * 16) for _ in range(4000)]
[libc.mlock(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(each))), 4096 * 16) for each in maps]
""",
        """
import mmap
page = mmap.mmap(-1, 4096)
print(libc.mlock(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(page))), 4096) == 0)
""",
    ),
    "descriptors in transit": (
        """
import array, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
full, pairs = False, []
while not full and len(pairs) < 400:
    pairs.append(socket.socketpair())
    pairs[-1][0].setblocking(False)
    try:
        while True:
            pairs[-1][0].sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 253))])
    except BlockingIOError:
        pass
    except OSError:
        full = True
""",
        "print(True)",  # the guest server passes descriptors to its spawner
    ),
    "message queues": (
        "[None for number in range(500) if libc.mq_open(b'/q%d' % number, 0o102, 0o600, None) < 0][:1]",
        "print(libc.mq_open(b'/q', 0o102, 0o600, None) >= 0)",
    ),
}
"""Programs that use up what the kernel counts per user, and programs that print whether another desktop has some."""


def test_programs_cannot_use_up_what_another_desktop_needs(config: DesktopConfig, run_root: Path) -> None:
    kinds = dict(EXHAUSTING)
    if own_users() is None:
        kinds.pop("inotify instances")  # the kernel counts those of all desktops of a user together

    async def scenario() -> dict[str, str]:
        async with (
            running_desktop(config, run_root) as desktop,
            running_desktop(config, run_root, "other") as other,
        ):
            for name, (exhaust, _) in kinds.items():
                marker = f"/home/user/{name.replace(' ', '-')}"
                await launch(desktop, f"{exhaust}\nopen('{marker}', 'w').write('yes'); time.sleep(1000)", marker)
            found = {name: await play(other, check) for name, (_, check) in kinds.items()}
            await desktop.launch("bomb() { bomb | bomb & }; bomb; sleep 1000", shell=True)
            await asyncio.sleep(1)
            found["processes"] = await play(other, "print([os.fork() or os._exit(0) for _ in range(20)] != [])")
            return found

    found = asyncio.run(scenario())
    assert set(found.values()) == {"True"}, found


def test_each_desktop_has_its_own_kernel_user_where_the_machine_gives_some(
    config: DesktopConfig, run_root: Path, provider: str
) -> None:
    if provider != "embedded":
        pytest.skip("containers: test_the_desktop_user_cannot_gain_privileges")

    def users(name: str) -> set[int]:
        first = psutil.Process(min(find_sandbox_processes(run_root.absolute() / name)))
        return {process.uids().real for process in [first, *first.children(recursive=True)]}

    async def scenario() -> None:
        async with running_desktop(config, run_root), running_desktop(config, run_root, "other"):
            found = users("desktop"), users("other")
            if own_users() is None:
                assert found == ({os.geteuid()}, {os.geteuid()})
            else:
                assert len(found[0]) == len(found[1]) == 1
                assert found[0] != found[1]
                assert os.geteuid() not in found[0] | found[1]

    asyncio.run(scenario())


UNREADABLE = {
    "a missing file": "true",
    "a FIFO": "mkfifo ~/x",
    "a folder": "mkdir ~/x",
    "a socket": f"{PYTHON} -c \"import socket; socket.socket(socket.AF_UNIX).bind('/home/user/x')\"",
    "a link to a device": "ln -s /dev/zero ~/x",
    "a link to the terminal": "ln -s /dev/stdin ~/x",
    "a link to the memory of the reader": "ln -s /proc/self/mem ~/x",
    "a link to the environment of the reader": "ln -s /proc/self/environ ~/x",
    "a link to a file of a process": "ln -s /proc/1/cmdline ~/x",
    "a link to an open file of the reader": "ln -s /proc/self/fd/0 ~/x",
    "a link to the root of the reader": "ln -s /proc/self/root/etc/hostname ~/x",
    "a link to a file of the guest server": "ln -s /run/framebuffer/Xvfb_screen0 ~/x",
    "a link out of the root": "ln -s ../../../../../../session/home/.Xdefaults ~/x",
    "a link to a file of the host": "ln -s /BESIDE ~/x",
    "a link to itself": "ln -s x ~/x",
    "a chain of links": "cd; for i in $(seq 60); do ln -s $i $((i - 1)); done; ln -s 0 x; echo > 60",
    "a sparse file of 200 GB": "truncate -s 200G ~/x",
    "a file above the limit": "head -c 3000000 /dev/zero > ~/x",
    "a file without permissions": "echo > ~/x; chmod 0 ~/x",
    "a file in a folder without permissions": "mkdir ~/d; echo > ~/d/x; ln -s d/x ~/x; chmod 0 ~/d",
}
"""Shell commands that make ~/x something that must count as missing."""


def test_files_that_are_not_regular_and_small_count_as_missing(
    config: DesktopConfig, run_root: Path, provider: str
) -> None:
    beside = Path(f"/deskrl-{os.getpid()}-secret")
    small = config.model_copy(update={"max_file_bytes": 2_000_000})
    planted = dict(UNREADABLE)
    if provider == "embedded":  # the only user of a sandbox owns its files, and the judge may read what the owner may
        planted.pop("a file without permissions")
        planted.pop("a file in a folder without permissions")

    async def scenario() -> list[str]:
        problems = []
        async with running_desktop(small, run_root) as desktop:
            for is_alive in (True, False):
                if not is_alive:
                    await desktop.end_setup()
                    await desktop.stop_all_programs()
                for name, command in planted.items():
                    clean = "chmod 700 ~/d 2>/dev/null; rm -rf ~/x ~/d ~/[0-9]*; "
                    await desktop.execute(clean + command.replace("/BESIDE", str(beside)), shell=True)
                    started_s = time.monotonic()
                    with contextlib.suppress(FileNotFoundError):
                        problems.append(f"{name}: {(await desktop.read_file('~/x'))[:80]!r}")
                    if time.monotonic() - started_s > 5:
                        problems.append(f"{name}: slow")
            for path in (
                "",
                "/",
                "~",
                "\0",
                "a" * 10_000,
                "../" * 3000 + "etc/passwd",
                "/proc/self/status",
                "/dev/zero",
            ):
                with pytest.raises(FileNotFoundError):
                    await desktop.read_file(path)
        return problems

    if os.geteuid() == 0:
        beside.write_text("secret")
    try:
        assert asyncio.run(scenario()) == []
    finally:
        beside.unlink(missing_ok=True)


RACES = {
    "a file that is replaced by a link": """
        while True:
            try:
                os.symlink("/etc/hostname", "/home/user/new"); os.rename("/home/user/new", "/home/user/x")
                open("/home/user/new", "w").write("mine"); os.rename("/home/user/new", "/home/user/x")
            except OSError:
                pass
    """,
    "a folder that is replaced by a link": """
        os.makedirs("/home/user/d", exist_ok=True)
        open("/home/user/d/x", "w").write("mine")
        os.symlink("d/x", "/home/user/x") if not os.path.islink("/home/user/x") else None
        while True:
            try:
                os.rename("/home/user/d", "/home/user/e"); os.symlink("/proc/1", "/home/user/d")
                os.unlink("/home/user/d"); os.rename("/home/user/e", "/home/user/d")
            except OSError:
                pass
    """,
    "a file that grows without end": """
        file = open("/home/user/x", "wb")
        while True:
            file.write(b"mine" * 100_000)
            if file.tell() > 100_000_000:
                file.seek(0); file.truncate()
    """,
    "a file with a lease": """
        import fcntl
        open("/home/user/x", "w").write("mine")
        fcntl.fcntl(os.open("/home/user/x", os.O_RDWR), 1024, fcntl.F_WRLCK)  # F_SETLEASE
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        time.sleep(1000)
    """,
    "a locked file": """
        import fcntl
        file = open("/home/user/x", "w")
        file.write("mine"); file.flush()
        fcntl.flock(file, fcntl.LOCK_EX); fcntl.lockf(file, fcntl.LOCK_EX)
        time.sleep(1000)
    """,
}
"""Programs that change ~/x while it is read."""


@pytest.mark.parametrize("name", RACES)
def test_a_file_that_changes_is_read_in_time_and_within_the_root(
    config: DesktopConfig, run_root: Path, name: str
) -> None:
    own = Path("/etc/hostname").read_bytes()
    small = config.model_copy(update={"max_file_bytes": 2_000_000})

    async def scenario() -> None:
        async with running_desktop(small, run_root) as desktop:
            await launch(desktop, STARTED + "\n" + textwrap.dedent(RACES[name]))
            for _ in range(200):
                try:
                    async with asyncio.timeout(RESPONSE_S):
                        data = await desktop.read_file("~/x")
                except FileNotFoundError:
                    continue
                assert data in (b"", own) or set(data) <= set(b"mine"), data[:100]
                assert len(data) <= small.max_file_bytes

    asyncio.run(scenario())


HIJACKS = {
    "programs on the PATH": "mkdir -p ~/bin ~/.local/bin; for p in cat echo ls python3 tr; do "
    "for d in ~/bin ~/.local/bin ~; do printf '#!/bin/sh\\necho forged\\n' > $d/$p; chmod +x $d/$p; done; done",
    "modules of Python's user folder": f"d=$({PYTHON} -m site --user-site); mkdir -p $d; "
    "for m in usercustomize sitecustomize json encodings; do echo 'print(\"forged\")' > $d/$m.py; done; "
    "echo 'import sys; print(\"forged\")' > $d/x.pth",
    "modules in the working folder": "cd; for m in json os site random usercustomize sitecustomize; do "
    "echo 'print(\"forged\")' > $m.py; done",
    "settings of shells": "cd; for f in .bashrc .profile .bash_profile .bash_env .shrc .env .pam_environment; do "
    "echo 'echo forged; cat() { echo forged; }; alias ls=\"echo forged\"' > $f; done; "
    "mkdir -p .config/environment.d; echo BASH_ENV=/home/user/.bashrc > .config/environment.d/x.conf",
    "preloaded libraries": "cd; echo /home/user/x.so > .ld.so.preload; mkdir -p lib; cp /bin/true lib/libc.so.6; "
    "cp /bin/true libc.so.6",
    "settings of Python": "cd; echo 'print(\"forged\")' > .pythonrc; mkdir -p .config/python; "
    "printf '[install]\\nuser=1\\n' > .pydistutils.cfg; echo home=/home/user > pyvenv.cfg",
}
"""Shell commands by which the policy plants something that evaluator commands could execute."""
EVALUATOR_COMMANDS: list[tuple[str | list[str], bool, str]] = [
    ("cat ~/result.txt", True, "true result"),
    ("ls ~/Documents | tr -d '\\n'", True, "kept"),
    (["cat", "/home/user/result.txt"], False, "true result"),
    (["python3", "-c", "import json, random; print(json.dumps(1))"], False, "1"),
    (["/usr/bin/python3", "-c", "import json, random; print(json.dumps(1))"], False, "1"),
    (["python", "-c", "import json, random; print(json.dumps(1))"], False, "1"),
    ("python3 -c 'import json; print(json.dumps(1))'", True, "1"),
    ("bash -c 'cat ~/result.txt'", True, "true result"),
]
"""Commands of evaluators, whether they are shell commands, and their output."""


@pytest.mark.parametrize("is_alive", [True, False], ids=["beside living programs", "after all programs"])
def test_nothing_in_the_home_is_executed_by_evaluator_commands(
    config: DesktopConfig, run_root: Path, is_alive: bool
) -> None:
    async def scenario() -> dict[str, str]:
        wrong = {}
        async with running_desktop(config, run_root) as desktop:
            await desktop.write_file("~/result.txt", b"true result")
            await desktop.write_file("~/Documents/kept", b"")
            await desktop.end_setup()
            for command in HIJACKS.values():
                await desktop.execute(command, shell=True)
            await desktop.stop_policy_programs()
            if not is_alive:
                await desktop.stop_all_programs()
            for line, shell, expected in EVALUATOR_COMMANDS:
                done = await desktop.execute(line, shell=shell)
                if done.stdout.strip() != expected:
                    wrong[str(line)] = done.stdout + done.stderr
        return wrong

    assert asyncio.run(scenario()) == {}


SURVIVORS = {
    "a daemon": "setsid sh -c 'sleep 1000 & setsid sleep 1000 &' &",
    "a fork storm": f'{PYTHON} -c "import os, time\nwhile 1:\n if os.fork(): os._exit(0)" &',
    "a fork bomb": f'{PYTHON} -c "import os\nwhile 1:\n try: os.fork()\n except OSError: pass" &',
    "a program that ignores signals": f'{PYTHON} -c "import signal, time\n'
    'for n in range(1, 32):\n  try: signal.signal(n, signal.SIG_IGN)\n  except OSError: pass\ntime.sleep(1000)" &',
    "a copy of a program of the setup": "cp /usr/bin/xterm ~/xterm; ~/xterm -T copied &",
    "the same program as one of the setup": "xterm -T forged &",
    "a stopped program": "sleep 1000 & kill -STOP $!",
    "a program with private memory": f'{PYTHON} -c "import ctypes, time; ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)\n'
    'time.sleep(1000)" &',
}
"""Shell commands that try to leave a program behind."""


@pytest.mark.parametrize("name", SURVIVORS)
def test_programs_of_the_policy_are_stopped_and_those_of_the_setup_live_on(
    config: DesktopConfig, run_root: Path, name: str
) -> None:
    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            await desktop.launch(["xterm", "-T", "setup"])
            await desktop.wait_for_window("setup")
            before = await session_programs(desktop)
            await desktop.end_setup()
            await desktop.launch(SURVIVORS[name], shell=True)
            await asyncio.sleep(0.7)
            await desktop.stop_policy_programs()
            assert await session_programs(desktop) <= before
            assert [window["title"] for window in await desktop.windows()] == ["setup"]

    asyncio.run(scenario())


def test_a_shell_of_the_setup_cannot_start_programs_after_it_was_suspended(
    config: DesktopConfig, run_root: Path
) -> None:
    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            await desktop.launch(["xterm", "-T", "setup"])
            await desktop.wait_for_window("setup")
            await desktop.settle()
            await desktop.end_setup()
            await desktop.act(Action(ActionKind.TYPE, text="while :; do date +%s.%N > stamp; sleep 0.05; done\n"))
            await wait_for_file(desktop, "~/stamp")
            await desktop.stop_policy_programs()
            stamp = await desktop.read_file("~/stamp")
            await asyncio.sleep(0.5)
            assert await desktop.read_file("~/stamp") == stamp
            assert [window["title"] for window in await desktop.windows()] == ["setup"]

    asyncio.run(scenario())


FORGED_WINDOW = """
    from Xlib import X, Xatom
    from Xlib.display import Display
    display = Display()
    window = display.screen().root.create_window(10, 10, 300, 200, 0, display.screen().root_depth, background_pixel=255)
    window.set_wm_name("forged")
    for pid in range(1, 100):
        window.change_property(display.intern_atom("_NET_WM_PID"), Xatom.CARDINAL, 32, [pid])
    window.set_wm_class("setup", "XTerm")
    window.map()
    CLOSE_DOWN
    display.sync()
    """


def test_a_window_inside_a_window_of_the_setup_is_removed(config: DesktopConfig, run_root: Path) -> None:
    source = """
        from Xlib import X
        from Xlib.display import Display
        display = Display()
        def find(window):
            for child in window.query_tree().children:
                if child.get_wm_class() == ("xterm", "XTerm"):
                    return child
                if found := find(child):
                    return found
        inside = find(display.screen().root).create_window(0, 0, 400, 300, 0, 24, background_pixel=0xFF0000)
        inside.map()
        display.set_close_down_mode(X.RetainPermanent)
        display.sync()
    """

    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            await desktop.launch(["xterm", "-T", "setup"])
            await desktop.wait_for_window("setup")
            await desktop.end_setup()
            done = await desktop.execute(["python", "-c", program(source)])
            assert done.returncode == 0, done.stderr
            assert (255, 0, 0) in [colour for _, colour in (await desktop.settle()).getcolors(1 << 20)]
            await desktop.stop_policy_programs()
            await desktop.redraw()
            assert (255, 0, 0) not in [colour for _, colour in (await desktop.settle()).getcolors(1 << 20)]

    asyncio.run(scenario())


@pytest.mark.parametrize("ends", [False, True], ids=["living", "ended"])
def test_a_window_is_attributed_to_the_process_that_opened_it(
    config: DesktopConfig, run_root: Path, ends: bool
) -> None:
    """Also if the process has ended, which by default removes its windows."""
    after = "time.sleep(0.3); os._exit(0)" if ends else "time.sleep(1000)"
    close_down = "display.set_close_down_mode(X.RetainPermanent)" if ends else ""
    source = textwrap.dedent(FORGED_WINDOW).replace("CLOSE_DOWN", close_down) + STARTED + "\n" + after

    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            await desktop.launch(["xterm", "-T", "setup"])
            await desktop.wait_for_window("setup")
            await desktop.end_setup()
            await desktop.launch(["python", "-c", program(source)])
            await desktop.wait_for_window("forged")
            await wait_for_file(desktop, "~/started")
            await asyncio.sleep(0.6)
            owners = {window["title"]: window for window in await desktop.windows()}
            assert owners["setup"]["is_setup_program"] and owners["setup"]["executable"] == "/usr/bin/xterm"
            assert not owners["forged"]["is_setup_program"]
            await desktop.stop_policy_programs()
            assert [window["title"] for window in await desktop.windows()] == ["setup"]

    asyncio.run(scenario())


def test_redrawing_removes_what_ended_programs_left_on_the_screen(config: DesktopConfig, run_root: Path) -> None:
    paint = """
        from Xlib.display import Display
        display = Display()
        root = display.screen().root
        pixmap = root.create_pixmap(640, 480, 24)
        gc = pixmap.create_gc(foreground=0xFF0000)
        pixmap.fill_rectangle(gc, 0, 0, 640, 480)
        root.change_attributes(background_pixmap=pixmap)
        root.clear_area()
        display.sync()
    """

    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            clean = await desktop.settle()
            await desktop.end_setup()
            await desktop.execute(["python", "-c", program(paint)])
            forged = await desktop.settle()
            assert forged.getpixel((100, 100)) == (255, 0, 0)
            await desktop.stop_policy_programs()
            await desktop.redraw()
            assert (await desktop.settle()).tobytes() == clean.tobytes()

    asyncio.run(scenario())


def test_no_key_and_no_click_on_the_background_opens_a_program(config: DesktopConfig, run_root: Path) -> None:
    keys = [("ctrl", "alt", "t"), ("win", "e"), ("win", "r"), ("alt", "f2"), ("alt", "f1"), ("alt", "space"), ("menu",)]
    keys += [("win", "d"), ("ctrl", "alt", "delete"), ("ctrl", "escape"), ("print",), ("alt", "escape")]

    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            before = await session_programs(desktop)
            screen = await desktop.settle()
            for names in keys:
                await desktop.act(Action(ActionKind.HOTKEY, keys=names))
            for kind in (ActionKind.RIGHT_CLICK, ActionKind.DOUBLE_CLICK, ActionKind.CLICK):
                await desktop.act(Action(kind, x=300, y=300))
            await desktop.act(Action(ActionKind.SCROLL, x=300, y=300, scroll_y=2))
            await desktop.settle()
            assert await session_programs(desktop) == before
            assert await desktop.windows() == []
            after = await desktop.settle()
            assert after.crop((0, 0, 200, 200)).tobytes() == screen.crop((0, 0, 200, 200)).tobytes(), "no menu is open"

    asyncio.run(scenario())


def test_a_terminal_can_be_allowed(config: DesktopConfig, run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            await desktop.allow_terminal()
            await desktop.end_setup()
            await desktop.act(Action(ActionKind.HOTKEY, keys=("ctrl", "alt", "t")))
            await desktop.wait_for_window("Terminal")

    asyncio.run(scenario())


def test_stopping_policy_programs_before_the_end_of_the_setup_is_an_error(
    config: DesktopConfig, run_root: Path
) -> None:
    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            with pytest.raises(DesktopError, match="the setup has not ended"):
                await desktop.stop_policy_programs()

    asyncio.run(scenario())


def kill_part(run_root: Path, name: str, number: signal.Signals) -> None:
    """Send a signal from the host to a process of a desktop, found by a word of its command line."""
    for pid in find_sandbox_processes(run_root / "desktop"):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            if any(shlex.quote(name) in word for word in process.cmdline()[:1]):
                process.send_signal(number)
                return
    raise AssertionError(f"no process {name}")


@pytest.mark.parametrize(
    ("part", "number", "cause"),
    [
        ("Xvfb", signal.SIGKILL, "ended from outside by SIGKILL"),
        ("perl", signal.SIGKILL, "ended from outside by SIGKILL"),
        ("python3.", signal.SIGKILL, "ended from outside by SIGKILL"),
        ("Xvfb", signal.SIGSEGV, None),
    ],
)
def test_an_end_by_the_host_is_told_from_an_end_by_the_policy(
    config: DesktopConfig, run_root: Path, provider: str, part: str, number: signal.Signals, cause: str | None
) -> None:
    if provider != "embedded":
        pytest.skip("requires processes that are found from the host")

    async def scenario() -> str | None:
        async with running_desktop(config, run_root) as desktop:
            assert desktop.can_observe_host
            assert await desktop.death_cause() is None
            kill_part(run_root, part, number)
            for _ in range(200):
                if not await desktop.is_alive():
                    return await desktop.death_cause()
                await asyncio.sleep(0.02)
            raise AssertionError("the desktop is alive")

    found = asyncio.run(scenario())
    assert (found is None) if cause is None else (found is not None and cause in found)


def test_a_desktop_that_the_actor_closed_names_the_actor(config: DesktopConfig, run_root: Path, provider: str) -> None:
    if provider == "emulated-container":
        pytest.skip("the emulation has no host side")

    async def scenario() -> str | None:
        async with running_desktop(config, run_root) as desktop:
            await desktop.close()
            return await desktop.death_cause()

    assert asyncio.run(scenario()) == "the actor closed the desktop"


def test_the_longest_output_of_a_command_fits_into_a_reply(config: DesktopConfig, run_root: Path) -> None:
    """The characters are those that become longest in JSON and UTF-8: control characters, no UTF-8, two, four bytes."""
    characters = [b"\1", b"\xff", "\u00e9".encode(), "\U0001f600".encode()]

    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            for character in characters:
                source = f"import os\nfor number in (1, 2):\n os.write(number, {character!r} * {MAX_OUTPUT_BYTES})"
                result = await desktop.execute([PYTHON, "-c", source])
                for output in (result.stdout, result.stderr):
                    assert len(output.encode()) >= MAX_OUTPUT_BYTES

    asyncio.run(scenario())


@pytest.mark.skipif(not landlock.is_available(), reason="the kernel has no Landlock")
def test_a_program_that_an_application_opens_a_file_with_cannot_write_to_its_memory(
    config: DesktopConfig, run_root: Path
) -> None:
    """The shell stands for the application: a program that it starts itself may write to its memory."""
    browser = "#!/bin/sh\n(: >> /proc/$(cat ~/pid)/mem) 2>/dev/null && echo out\nmkdir -p ~/a; : > ~/b; mv ~/b ~/a/b"
    command = "echo $$ > ~/pid; chmod +x ~/browser; {}; ls ~/a"

    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            await desktop.write_file("~/browser", browser.encode())
            opened = await desktop.execute(command.format("BROWSER=~/browser xdg-open unknown://x"), shell=True)
            assert opened.stdout == "b\n"
            started = await desktop.execute(command.format("~/browser"), shell=True)
            assert started.stdout == "out\nb\n"

    asyncio.run(scenario())
