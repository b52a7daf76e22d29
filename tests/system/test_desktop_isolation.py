"""Nothing that is done inside a desktop reaches the machine, and the worst of it costs one reset.

On every provider whose desktops run on this machine: sandboxes, and containers of a real docker daemon.
"""

import asyncio
import os
import re
import socket
import sys
import textwrap
from asyncio.subprocess import PIPE
from pathlib import Path

import psutil
import pytest
from desktop_kit import running_desktop

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops import containers
from deskrl.actor.desktops.base import Desktop, DesktopError, DesktopGone
from deskrl.actor.desktops.packages import missing_packages
from deskrl.core.config import DesktopConfig

REMOTE_S = 2.0
MEMORY_BYTES = 256 * 1024**2
MAX_PROCESSES = 128


@pytest.fixture(params=["embedded", "docker"])
def config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DesktopConfig:
    """Small desktops of each provider."""
    if request.param == "docker":
        monkeypatch.setenv("DOCKER_HOST", request.getfixturevalue("docker_address"))
        request.addfinalizer(containers.connect.cache_clear)
        containers.connect.cache_clear()
    elif missing := missing_packages():
        pytest.skip(f"packages missing: {missing}")
    return DesktopConfig(
        provider=request.param, width=640, height=480, memory_bytes=MEMORY_BYTES, max_processes=MAX_PROCESSES
    )


async def attempt(desktop: Desktop, command: str) -> None:
    """Run what may take the desktop down, and give it some seconds to do its worst."""
    try:
        async with asyncio.timeout(REMOTE_S):
            await desktop.execute(command, shell=True)
    except (DesktopError, TimeoutError):
        pass


async def works(desktop: Desktop) -> bool:
    """Whether input reaches an application."""
    await desktop.launch("xterm")
    await desktop.wait_for_window("xterm")
    await desktop.settle()
    await desktop.act(Action(ActionKind.TYPE, text="echo here > ~/typed.txt; exit\n"))
    while await desktop.windows():
        await desktop.settle()
    return await desktop.read_file("~/typed.txt") == b"here\n"


def test_removing_every_file_harms_nothing_outside_and_costs_one_reset(config: DesktopConfig, run_root: Path) -> None:
    beside = run_root.parent / "beside.txt"
    beside.write_text("kept")
    programs = len(os.listdir("/usr/bin"))

    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            await attempt(desktop, "rm -rf --no-preserve-root /home/user/* /")
            await desktop.reset()
            assert await works(desktop)

    asyncio.run(scenario())
    assert beside.read_text() == "kept"
    assert len(os.listdir("/usr/bin")) == programs


def test_a_fork_bomb_meets_its_limit_and_costs_one_reset(config: DesktopConfig, run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop, running_desktop(config, run_root, "other") as other:
            await attempt(desktop, "bomb() { bomb | bomb & }; bomb; sleep 1000")
            assert await works(other)
            await desktop.reset()
            assert await works(desktop)

    asyncio.run(scenario())


def test_memory_and_processes_are_limited(config: DesktopConfig, run_root: Path) -> None:
    hog = f"x = b'x' * {MEMORY_BYTES}; print('got it')"
    breed = f"""
        import os, signal
        children = []
        try:
            while len(children) < {4 * MAX_PROCESSES}:
                children.append(os.fork() or signal.pause())
        except BlockingIOError:
            print(len(children))
        for child in children:
            os.kill(child, signal.SIGKILL)
    """

    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            done = await desktop.execute(["/usr/bin/python3", "-c", hog])
            assert done.returncode != 0
            assert "got it" not in done.stdout
            done = await desktop.execute(["/usr/bin/python3", "-c", textwrap.dedent(breed)])
            assert 0 < int(done.stdout) < MAX_PROCESSES

    asyncio.run(scenario())


def test_a_full_home_folder_fills_no_disk(config: DesktopConfig, run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            kinds = await desktop.execute("stat --file-system --format %T ~ /tmp /run /dev/shm", shell=True)
            assert set(kinds.stdout.split()) == {"tmpfs"}
            writable = await desktop.execute("find / -xdev -path /proc -prune -o -writable -type f -print", shell=True)
            assert writable.stdout == ""
            mounts = [line.split() for line in (await desktop.read_file("/proc/mounts")).decode().splitlines()]
            kept = {kind for _, _, kind, options, *_ in mounts if "rw" in options.split(",")}
            assert kept <= {"tmpfs", "proc", "devpts", "mqueue", "devtmpfs"}, "the last: /dev/null and its like"

    asyncio.run(scenario())


CONNECT = """
import socket, sys
for text in sys.argv[2:]:
    family = {"unix": socket.AF_UNIX, "inet6": socket.AF_INET6}.get(text.split("=")[0], socket.AF_INET)
    place = text.split("=")[1]
    try:
        attempt = socket.socket(family)
        attempt.settimeout(1)
        attempt.connect("\\0" + place if family == socket.AF_UNIX else (place, int(sys.argv[1])))
    except OSError:
        continue
    print(text)
"""
"""Prints the addresses that it can connect to."""


def own_addresses() -> list[str]:
    """The addresses under which this machine is reached, for CONNECT."""
    kinds = {socket.AF_INET: "inet", socket.AF_INET6: "inet6"}
    listed = [address for interface in psutil.net_if_addrs().values() for address in interface]
    return [f"{kinds[address.family]}={address.address}" for address in listed if address.family in kinds]


def test_the_network_is_its_own(config: DesktopConfig, run_root: Path) -> None:
    """No port of the machine answers on any of its addresses, nor a socket in its abstract name space."""
    name = f"deskrl-test-{os.getpid()}"

    async def scenario() -> None:
        with (
            socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as tcp,
            socket.socket(socket.AF_UNIX) as abstract,
        ):
            abstract.bind(f"\0{name}")
            abstract.listen()
            async with running_desktop(config, run_root) as desktop:
                program = [CONNECT, str(tcp.getsockname()[1]), *own_addresses(), f"unix={name}"]
                here = await asyncio.create_subprocess_exec(sys.executable, "-c", *program, stdout=PIPE)
                reached = (await here.communicate())[0].decode().split()
                assert {"inet=127.0.0.1", f"unix={name}"} <= set(reached), "it connects to what answers"
                done = await desktop.execute(["/usr/bin/python3", "-c", *program])
                assert (done.returncode, done.stdout) == (0, ""), done.stderr
                interfaces = (await desktop.read_file("/proc/net/dev")).decode().splitlines()[2:]
                assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]

    asyncio.run(scenario())


def test_no_desktop_is_reached_from_another(config: DesktopConfig, run_root: Path) -> None:
    """Nor its guest server, which does whatever it is asked to."""
    listen = "import socket, time; server = socket.create_server(('', 5999)); time.sleep(1000)"
    answers = "import socket; socket.create_connection(('127.0.0.1', 5999))"

    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop, running_desktop(config, run_root, "other") as other:
            await other.launch(["/usr/bin/python3", "-c", listen])
            while (await other.execute(["/usr/bin/python3", "-c", answers])).returncode != 0:
                await other.settle()
            trie = (await other.read_file("/proc/net/fib_trie")).decode()
            addresses = [f"inet={address}" for address in sorted(set(re.findall(r"-- ([\d.]+)\n.*host LOCAL", trie)))]
            assert addresses
            for port in ("5999", "5000"):
                done = await desktop.execute(["/usr/bin/python3", "-c", CONNECT, port, *addresses])
                assert (done.returncode, done.stdout) == (0, ""), done.stderr

    asyncio.run(scenario())


def test_it_has_a_user_of_its_own_without_a_way_to_more_rights(config: DesktopConfig, run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            assert (await desktop.execute("id -un; id -u", shell=True)).stdout.split() == ["user", "1000"]
            status = (await desktop.read_file("/proc/self/status")).decode()
            assert "NoNewPrivs:\t1" in status
            assert set(re.findall(r"Cap(?:Eff|Prm|Inh|Amb|Bnd):\t(\w+)", status)) == {"0" * 16}
            assert (await desktop.execute(["unshare", "--user", "true"])).returncode != 0
            assert (await desktop.execute("ls /root /home", shell=True)).stdout.count("user") == 1

    asyncio.run(scenario())


def test_desktops_do_not_see_one_another(config: DesktopConfig, run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop, running_desktop(config, run_root, "other") as other:
            await other.launch(["sleep", "12345"])
            await other.write_file("/tmp/mine", b"")
            assert "12345" not in (await desktop.execute(["ps", "ax"])).stdout
            assert (await desktop.execute(["ls", "/tmp/mine"])).returncode != 0
            await desktop.launch("xterm")
            await desktop.wait_for_window("xterm")
            assert await other.windows() == []

    asyncio.run(scenario())


def test_a_desktop_whose_server_was_killed_is_gone_and_says_so(config: DesktopConfig, run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            with pytest.raises(DesktopGone):
                await desktop.execute("kill -9 -1; sleep 1000", shell=True)
            assert not await desktop.is_alive()
            with pytest.raises(DesktopGone):
                await desktop.screenshot()
            await desktop.reset()
            assert await desktop.is_alive()

    asyncio.run(scenario())


ESCAPES = {
    # What is tried, as a program that prints `out` if it got there; anything else is a wall.
    "the cloud's metadata": """
        import socket
        for address in (("169.254.169.254", 80), ("fd00:ec2::254", 80)):
            try:
                socket.create_connection(address, 2)
            except OSError:
                continue
            print("out")
    """,
    "a name server": """
        import socket
        socket.getaddrinfo("example.com", 80)
        print("out")
    """,
    "a datagram to the network": """
        import socket
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("10.0.0.1", 53))
        print("out")
    """,
    "raw packets": """
        import socket
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)
        print("out")
    """,
    "the virtual machine's host": """
        import socket
        socket.socket(40)  # AF_VSOCK, which no namespace parts: whoever has one can call
        print("out")
    """,
    "what filters of system calls do not see": """
        import ctypes
        queue = ctypes.CDLL(None, use_errno=True).syscall(425, 1, ctypes.create_string_buffer(120))  # io_uring_setup
        assert queue >= 0, ctypes.get_errno()
        print("out")
    """,
    "the machine's secrets": """
        open("/etc/shadow").read()
        print("out")
    """,
    "the machine's sockets": """
        import pathlib, socket
        found = [path for folder in ("/run", "/var", "/tmp") for path in pathlib.Path(folder).rglob("*.sock")]
        for path in [pathlib.Path("/var/run/docker.sock"), *found]:
            try:
                socket.socket(socket.AF_UNIX).connect(str(path))
            except OSError:
                continue
            print("out")
    """,
    "a way up through /proc": """
        import os
        for process in filter(str.isdecimal, os.listdir("/proc")):
            if os.path.exists(f"/proc/{process}/root/BESIDE"):
                print("out")
    """,
    "the kernel's switches": """
        open("/proc/sys/kernel/core_pattern", "w").write("|/bin/true")
        print("out")
    """,
    "the kernel's trigger": """
        open("/proc/sysrq-trigger", "w").write("s")
        print("out")
    """,
    "the machine's memory": """
        open("/dev/mem", "rb").read(1)
        print("out")
    """,
    "a disk": """
        import os
        os.mknod("/tmp/disk", 0o060600, os.makedev(8, 0))
        open("/tmp/disk", "rb").read(1)
        print("out")
    """,
    "devices": """
        import os
        if set(os.listdir("/dev")) - {"null", "zero", "full", "random", "urandom", "tty", "pts", "ptmx", "console",
                                      "shm", "mqueue", "fd", "stdin", "stdout", "stderr", "core"}:
            print("out")
    """,
    "a mount": """
        import ctypes
        if ctypes.CDLL(None).mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0:
            print("out")
    """,
    "another root": """
        import os
        os.chroot("/tmp")
        print("out")
    """,
    "control groups": """
        import pathlib
        for path in pathlib.Path("/sys/fs/cgroup").rglob("cgroup.procs"):
            try:
                path.write_text("0")
            except OSError:
                continue
            print("out")
    """,
    "a module": """
        import ctypes
        if ctypes.CDLL(None).syscall(313, -1, b"", 0) == 0:  # finit_module
            print("out")
    """,
    "the clock": """
        import time
        time.clock_settime(time.CLOCK_REALTIME, time.time())
        print("out")
    """,
    "a program of root's": """
        import subprocess
        print(subprocess.run(["su", "-c", "echo out"], capture_output=True, text=True, input="").stdout)
    """,
    "the keys of the kernel": """
        import ctypes
        if ctypes.CDLL(None).syscall(250, 11, -3, 0, 0, 0) > 0:  # keyctl: read the session's keyring
            print("out")
    """,
}


def test_no_way_out_is_open(config: DesktopConfig, run_root: Path) -> None:
    beside = Path(f"/deskrl-{os.getpid()}")

    async def scenario() -> dict[str, str]:
        async with running_desktop(config, run_root) as desktop:
            said = {}
            for name, program in ESCAPES.items():
                program = textwrap.dedent(program).replace("/BESIDE", str(beside))
                said[name] = (await desktop.execute(["/usr/bin/python3", "-c", program])).stdout.strip()
            assert (await desktop.execute(["/usr/bin/python3", "-c", "print('out')"])).stdout == "out\n", "they can run"
            return said

    beside.mkdir()
    try:
        said = asyncio.run(scenario())
    finally:
        beside.rmdir()
    assert set(said.values()) == {""}, {name: text for name, text in said.items() if text}


def test_processes_of_the_machine_are_out_of_sight_and_reach(config: DesktopConfig, run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            marker = f"deskrl-bystander-{os.getpid()}"
            bystander = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", marker, stdin=PIPE)
            try:
                listing = (await desktop.execute("cat /proc/[0-9]*/cmdline | tr '\\0' ' '", shell=True)).stdout
                assert marker not in listing
                await desktop.execute(["kill", "-9", str(bystander.pid)])
                assert bystander.returncode is None
            finally:
                bystander.kill()
                await bystander.wait()

    asyncio.run(scenario())


def test_nothing_secret_of_the_actor_is_inside(
    config: DesktopConfig, run_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not its environment, and none of its open files."""
    monkeypatch.setenv("DESKRL_TEST_SECRET", "swordfish")

    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            environments = (await desktop.execute("cat /proc/[0-9]*/environ 2>/dev/null", shell=True)).stdout
            assert "PATH=" in environments
            assert "swordfish" not in environments
            files = (await desktop.execute("ls -l /proc/[0-9]*/fd 2>/dev/null", shell=True)).stdout
            assert Path(__file__).name not in files

    with open(__file__, "rb") as opened:
        os.set_inheritable(opened.fileno(), True)
        asyncio.run(scenario())
