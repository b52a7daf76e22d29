"""Programs of a desktop cannot affect the host or other desktops, and a reset repairs any damage.

Tested with every provider whose desktops run on this machine: sandboxes, containers of a real docker daemon, and an
emulation of such a container, which needs root but no daemon. `tests/system/as_ordinary_user.sh pytest ...` runs these
tests as an ordinary user.
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
from desktop_kit import SMALL_MAX_PROCESSES, SMALL_MEMORY_BYTES, running_desktop

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.base import Desktop, DesktopError
from deskrl.core.config import DesktopConfig

ATTACK_TIMEOUT_S = 2.0


async def run_attack(desktop: Desktop, command: str) -> None:
    """Run a command that may destroy the desktop, for at most ATTACK_TIMEOUT_S."""
    try:
        async with asyncio.timeout(ATTACK_TIMEOUT_S):
            await desktop.execute(command, shell=True)
    except (DesktopError, TimeoutError):
        pass


async def output(desktop: Desktop, command: str) -> str:
    """Return the standard output of a shell command."""
    return (await desktop.execute(command, shell=True)).stdout


async def is_usable(desktop: Desktop) -> bool:
    """Return whether an application receives input."""
    await desktop.launch("xterm")
    await desktop.wait_for_window("xterm")
    await desktop.settle()
    await desktop.act(Action(ActionKind.TYPE, text="echo here > ~/typed.txt; exit\n"))
    while await desktop.windows():
        await desktop.settle()
    return await desktop.read_file("~/typed.txt") == b"here\n"


def test_removing_all_files_spares_the_host_and_is_repaired_by_a_reset(config: DesktopConfig, run_root: Path) -> None:
    beside = run_root.parent / "beside.txt"
    beside.write_text("kept")
    programs = len(os.listdir("/usr/bin"))

    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            await run_attack(desktop, "rm -rf --no-preserve-root /home/user/* /")
            await desktop.reset()
            assert await is_usable(desktop)

    asyncio.run(scenario())
    assert beside.read_text() == "kept"
    assert len(os.listdir("/usr/bin")) == programs


def test_a_fork_bomb_is_limited_and_repaired_by_a_reset(config: DesktopConfig, run_root: Path) -> None:
    async def scenario() -> None:
        async with (
            running_desktop(config, run_root) as desktop,
            running_desktop(config, run_root, "other") as other,
        ):
            await run_attack(desktop, "bomb() { bomb | bomb & }; bomb; sleep 1000")
            assert await is_usable(other)
            await desktop.reset()
            assert await is_usable(desktop)

    asyncio.run(scenario())


def test_memory_and_the_number_of_processes_are_limited(config: DesktopConfig, run_root: Path) -> None:
    allocate = f"x = b'x' * {SMALL_MEMORY_BYTES}; print('allocated')"
    fork = f"""
        import os, signal
        children = []
        try:
            while len(children) < {4 * SMALL_MAX_PROCESSES}:
                children.append(os.fork() or signal.pause())
        except BlockingIOError:
            print(len(children))
        for child in children:
            os.kill(child, signal.SIGKILL)
    """

    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            done = await desktop.execute(["/usr/bin/python3", "-c", allocate])
            assert done.returncode != 0
            assert "allocated" not in done.stdout
            done = await desktop.execute(["/usr/bin/python3", "-c", textwrap.dedent(fork)])
            assert 0 < int(done.stdout) < SMALL_MAX_PROCESSES

    asyncio.run(scenario())


def test_all_writable_folders_are_in_memory(config: DesktopConfig, run_root: Path, provider: str) -> None:
    if provider == "emulated-container":
        pytest.skip("the emulation has a home on a disk")

    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            kinds = await desktop.execute("stat --file-system --format %T ~ /tmp /run /dev/shm", shell=True)
            assert set(kinds.stdout.split()) == {"tmpfs"}
            writable = await desktop.execute("find / -xdev -path /proc -prune -o -writable -type f -print", shell=True)
            assert writable.stdout == ""
            mounts = [line.split() for line in (await output(desktop, "cat /proc/mounts")).splitlines()]
            writable_kinds = {kind for _, _, kind, options, *_ in mounts if "rw" in options.split(",")}
            assert writable_kinds <= {"tmpfs", "proc", "devpts", "mqueue", "devtmpfs"}, "devtmpfs: /dev/null etc."

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
"""Program that prints the addresses to which it can connect."""


def own_addresses() -> list[str]:
    """Return the addresses of this machine as arguments of CONNECT."""
    kinds = {socket.AF_INET: "inet", socket.AF_INET6: "inet6"}
    listed = [address for interface in psutil.net_if_addrs().values() for address in interface]
    return [f"{kinds[address.family]}={address.address}" for address in listed if address.family in kinds]


def test_no_port_and_no_abstract_socket_of_the_host_is_reachable(config: DesktopConfig, run_root: Path) -> None:
    """The network interface of the desktop is its own loopback interface only."""
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
                assert {"inet=127.0.0.1", f"unix={name}"} <= set(reached), "CONNECT must reach them from the host"
                done = await desktop.execute(["/usr/bin/python3", "-c", *program])
                assert (done.returncode, done.stdout) == (0, ""), done.stderr
                interfaces = (await output(desktop, "cat /proc/net/dev")).splitlines()[2:]
                assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]

    asyncio.run(scenario())


def test_no_port_and_no_guest_server_of_another_desktop_is_reachable(config: DesktopConfig, run_root: Path) -> None:
    """Nor its guest server, which does whatever it is asked to."""
    listen = "import socket, time; server = socket.create_server(('', 5999)); time.sleep(1000)"
    answers = "import socket; socket.create_connection(('127.0.0.1', 5999))"

    async def scenario() -> None:
        async with (
            running_desktop(config, run_root) as desktop,
            running_desktop(config, run_root, "other") as other,
        ):
            await other.launch(["/usr/bin/python3", "-c", listen])
            while (await other.execute(["/usr/bin/python3", "-c", answers])).returncode != 0:
                await other.settle()
            trie = await output(other, "cat /proc/net/fib_trie")
            addresses = [f"inet={address}" for address in sorted(set(re.findall(r"-- ([\d.]+)\n.*host LOCAL", trie)))]
            assert addresses
            for port in ("5999", "5000"):
                done = await desktop.execute(["/usr/bin/python3", "-c", CONNECT, port, *addresses])
                assert (done.returncode, done.stdout) == (0, ""), done.stderr

    asyncio.run(scenario())


def test_the_desktop_user_cannot_gain_privileges(config: DesktopConfig, run_root: Path, provider: str) -> None:
    async def scenario() -> None:
        async with running_desktop(config, run_root) as desktop:
            name, user_id = (await output(desktop, "id -un; id -u")).split()
            assert name == "user"
            assert user_id == "1000" if provider == "embedded" else int(user_id) > 1000, "one user for each container"
            status = await output(desktop, "cat /proc/self/status")
            assert "NoNewPrivs:\t1" in status
            # Inheritable capabilities and the bounding set matter only for programs that may gain privileges.
            assert set(re.findall(r"Cap(?:Eff|Prm|Amb):\t(\w+)", status)) == {"0" * 16}
            if provider != "emulated-container":  # forbidden by docker's seccomp profile
                assert (await desktop.execute(["unshare", "--user", "true"])).returncode != 0
            assert (await desktop.execute("ls /root /home", shell=True)).stdout.count("user") == 1

    asyncio.run(scenario())


def test_processes_files_and_windows_of_another_desktop_are_invisible(config: DesktopConfig, run_root: Path) -> None:
    async def scenario() -> None:
        async with (
            running_desktop(config, run_root) as desktop,
            running_desktop(config, run_root, "other") as other,
        ):
            await other.launch(["sleep", "12345"])
            await other.write_file("/tmp/mine", b"")
            assert "12345" not in (await desktop.execute(["ps", "ax"])).stdout
            assert (await desktop.execute(["ls", "/tmp/mine"])).returncode != 0
            await desktop.launch("xterm")
            await desktop.wait_for_window("xterm")
            assert await other.windows() == []

    asyncio.run(scenario())


ESCAPES = {
    # Each program prints `out` if the escape succeeds.
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
    "the host of the virtual machine": """
        import socket
        socket.socket(40)  # AF_VSOCK, which is not covered by namespaces
        print("out")
    """,
    "io_uring, which bypasses system call filters": """
        import ctypes
        queue = ctypes.CDLL(None, use_errno=True).syscall(425, 1, ctypes.create_string_buffer(120))  # io_uring_setup
        assert queue >= 0, ctypes.get_errno()
        print("out")
    """,
    "password hashes of the host": """
        open("/etc/shadow").read()
        print("out")
    """,
    "Unix sockets of the host": """
        import pathlib, socket
        found = [path for folder in ("/run", "/var", "/tmp") for path in pathlib.Path(folder).rglob("*.sock")]
        for path in [pathlib.Path("/var/run/docker.sock"), *found]:
            try:
                socket.socket(socket.AF_UNIX).connect(str(path))
            except OSError:
                continue
            print("out")
    """,
    "the host's root folder through /proc": """
        import os
        for process in filter(str.isdecimal, os.listdir("/proc")):
            if os.path.exists(f"/proc/{process}/root/BESIDE"):
                print("out")
    """,
    "kernel parameters": """
        open("/proc/sys/kernel/core_pattern", "w").write("|/bin/true")
        print("out")
    """,
    "the sysrq trigger": """
        open("/proc/sysrq-trigger", "w").write("s")
        print("out")
    """,
    "physical memory": """
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
    "a kernel module": """
        import ctypes
        if ctypes.CDLL(None).syscall(313, -1, b"", 0) == 0:  # finit_module
            print("out")
    """,
    "the clock": """
        import time
        time.clock_settime(time.CLOCK_REALTIME, time.time())
        print("out")
    """,
    "a setuid program": """
        import subprocess
        print(subprocess.run(["su", "-c", "echo out"], capture_output=True, text=True, input="").stdout)
    """,
    "the session keyring of the kernel": """
        import ctypes
        if ctypes.CDLL(None).syscall(250, 11, -3, 0, 0, 0) > 0:  # keyctl: read the session keyring
            print("out")
    """,
}


def test_no_known_escape_succeeds(config: DesktopConfig, run_root: Path) -> None:
    beside = run_root.parent / "beside"

    async def scenario() -> dict[str, str]:
        async with running_desktop(config, run_root) as desktop:
            outputs = {}
            for name, program in ESCAPES.items():
                program = textwrap.dedent(program).replace("/BESIDE", str(beside))
                outputs[name] = (await desktop.execute(["/usr/bin/python3", "-c", program])).stdout.strip()
            assert (await desktop.execute(["/usr/bin/python3", "-c", "print('out')"])).stdout == "out\n", (
                "programs must be able to run"
            )
            return outputs

    beside.mkdir()
    try:
        outputs = asyncio.run(scenario())
    finally:
        beside.rmdir()
    assert set(outputs.values()) == {""}, {name: text for name, text in outputs.items() if text}


def test_processes_of_the_host_can_neither_be_seen_nor_killed(config: DesktopConfig, run_root: Path) -> None:
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


def test_the_actors_environment_and_open_files_are_inaccessible(
    config: DesktopConfig, run_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
