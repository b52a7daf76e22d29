"""Attacks on the guest server from inside a desktop, as Python programs that print `out` if they succeed.

The programs run as the policy's programs would. They may use `judges` and `me`, which PRELUDE defines.
"""

from __future__ import annotations

import textwrap

PRELUDE = """
import ctypes, os, signal, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
me = os.getpid()

def judges():
    "Processes that are not the session's: the guest server, its spawner and the X server, if they are visible."
    found = []
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = open(f"/proc/{entry}/cmdline").read().split(chr(0))
        except OSError:
            continue
        if int(entry) not in (me, 1) and ("deskrl.actor.guest" in words or words[0].endswith("Xvfb")):
            found.append(int(entry))
    return found

def attempt(operation, *arguments):
    try:
        result = operation(*arguments)
    except (OSError, ValueError, ProcessLookupError):
        return
    if result != -1:
        print("out")

def peer_pidfd(path):
    connected = socket.socket(socket.AF_UNIX)
    connected.connect(path)
    return connected.getsockopt(socket.SOL_SOCKET, 77)  # SO_PEERPIDFD
"""
"""Definitions before each program."""

ON_PROCESSES = {
    "a signal to the guest server": """
        for pid in judges():
            attempt(os.kill, pid, 0)
            attempt(os.kill, pid, signal.SIGSTOP)
    """,
    "a signal to its process group": """
        for pid in judges():
            if os.getpgid(pid) > 0:  # 0: a group outside this namespace
                attempt(os.killpg, os.getpgid(pid), signal.SIGSTOP)
    """,
    "a signal through the X server's pidfd": """
        attempt(signal.pidfd_send_signal, peer_pidfd("/tmp/.X11-unix/X0"), signal.SIGSTOP)
    """,
    "a signal through a pidfd": """
        for pid in judges():
            attempt(signal.pidfd_send_signal, os.pidfd_open(pid), signal.SIGSTOP)
    """,
    "a descriptor of the guest server": """
        for pid in judges():
            pidfd = os.pidfd_open(pid)
            for number in range(64):
                attempt(libc.syscall, 438, pidfd, number, 0)  # pidfd_getfd
    """,
    "a descriptor of the X server": """
        for number in range(64):
            attempt(libc.syscall, 438, peer_pidfd("/tmp/.X11-unix/X0"), number, 0)
    """,
    "a descriptor of a process of the session": """
        child = os.fork() or signal.pause()
        attempt(libc.syscall, 438, os.pidfd_open(child), 0, 0)
        os.kill(child, 9)
    """,
    "the namespaces of the X server": """
        attempt(libc.setns, peer_pidfd("/tmp/.X11-unix/X0"), 0x10000000 | 0x00020000 | 0x20000000)
    """,
    "the namespaces of other processes": """
        for pid in judges():
            for kind in ("user", "mnt", "pid", "net"):
                try:
                    attempt(libc.setns, os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY), 0)
                except OSError:
                    pass
    """,
    "tracing": """
        for pid in [*judges(), 1]:
            attempt(libc.ptrace, 16, pid, 0, 0)  # PTRACE_ATTACH
            attempt(libc.ptrace, 0x4206, pid, 0, 0)  # PTRACE_SEIZE
    """,
    "tracing of a child process": """
        child = os.fork() or signal.pause()
        attempt(libc.ptrace, 0x4206, child, 0, 0)
        os.kill(child, 9)
    """,
    "memory of other processes": """
        for pid in [*judges(), 1]:
            for mode in ("rb", "r+b"):
                attempt(open, f"/proc/{pid}/mem", mode)
    """,
    "process_vm_readv": """
        buffer = ctypes.create_string_buffer(8)
        vector = struct.pack("QQ", ctypes.addressof(buffer), 8)
        for pid in [*judges(), 1, me]:
            attempt(libc.process_vm_readv, pid, vector, 1, vector, 1, 0)
            attempt(libc.process_vm_writev, pid, vector, 1, vector, 1, 0)
    """,
    "files that other processes have open": """
        for pid in [*judges(), 1]:
            attempt(os.listdir, f"/proc/{pid}/fd")
    """,
    "the root and the working folder of other processes": """
        for pid in [*judges(), 1]:
            for name in ("root", "cwd", "exe"):
                attempt(os.readlink, f"/proc/{pid}/{name}")
    """,
    "the environment of other processes": """
        for pid in [*judges(), 1]:
            attempt(lambda: open(f"/proc/{pid}/environ").read())
    """,
    "the memory map of other processes": """
        for pid in [*judges(), 1]:
            attempt(lambda: open(f"/proc/{pid}/maps").read() or 1 / 0)
    """,
    "memory and descriptors of other programs of the session": """
        others = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) not in (1, me)]
        assert others
        for pid in others:
            attempt(open, f"/proc/{pid}/mem", "r+b")
            attempt(lambda: open(f"/proc/{pid}/maps").read() or 1 / 0)
            attempt(os.readlink, f"/proc/{pid}/cwd")
            for number in range(8):
                attempt(open, f"/proc/{pid}/fd/{number}", "rb")
    """,
    "memory of other programs of the session from an own domain": """
        ruleset = libc.syscall(444, struct.pack("Q", 1), 8, 0)
        libc.syscall(446, ruleset, 0)
        for name in filter(str.isdigit, os.listdir("/proc")):
            if int(name) != me:
                attempt(open, f"/proc/{name}/mem", "r+b")
    """,
    "resource limits of the guest server": """
        import resource
        for pid in judges():
            attempt(resource.prlimit, pid, resource.RLIMIT_NOFILE, (3, 3))
    """,
    "the processors of the guest server": """
        for pid in judges():
            attempt(os.sched_setaffinity, pid, {0})
    """,
    "the priority of the guest server": """
        for pid in judges():
            attempt(os.setpriority, os.PRIO_PROCESS, pid, 19)
            attempt(os.sched_setscheduler, pid, os.SCHED_IDLE, os.sched_param(0))
            attempt(libc.syscall, 251, 1, pid, 3 << 13)  # ioprio_set: idle
    """,
    "the out-of-memory score of other processes": """
        for pid in [*judges(), 1]:
            attempt(lambda: open(f"/proc/{pid}/oom_score_adj", "w").write("1000"))
    """,
    "a name for the thread of another process": """
        for pid in [*judges(), 1]:
            attempt(lambda: open(f"/proc/{pid}/comm", "w").write("x"))
    """,
    "keys of the kernel": """
        for number in (-3, -4, -5):
            attempt(libc.syscall, 250, 0, number, 1)  # keyctl: KEYCTL_GET_KEYRING_ID
        attempt(libc.syscall, 248, b"user", b"deskrl-test", b"x", 1, -4)  # add_key
        attempt(libc.syscall, 249, b"user", b"deskrl-test", None, -4)  # request_key
    """,
    "keys through the 32-bit interface": """
        import mmap
        code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        code.write(bytes([0x53, 0xB8, 0x20, 1, 0, 0, 0x31, 0xDB, 0xB9, 0xFC, 255, 255, 255, 0xBA, 1, 0, 0, 0, 0xCD,
                          0x80, 0x5B, 0xC3]))  # keyctl is call 288 there
        call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
        if call() > 0:
            print("out")
    """,
    "kernel programs": """
        attempt(libc.syscall, 321, 0, ctypes.create_string_buffer(128), 128)  # bpf
    """,
    "performance counters": """
        attempt(libc.syscall, 298, struct.pack("II", 1, 112) + bytes(104), 0, -1, -1, 0)  # perf_event_open
    """,
    "handling of page faults": """
        attempt(libc.syscall, 323, 1)  # userfaultfd
    """,
    "a user namespace": """
        attempt(libc.unshare, 0x10000000)
    """,
    "another process namespace": """
        attempt(libc.unshare, 0x20000000)
    """,
    "another root for programs": """
        attempt(libc.unshare, 0x00020000)
    """,
}
"""Attacks through process ids, descriptors and the kernel."""

ON_SOCKETS = {
    "the X server's socket": """
        for operation in (os.unlink, lambda path: os.rename(path, "/tmp/moved"), lambda path: open(path, "w")):
            attempt(operation, "/tmp/.X11-unix/X0")
    """,
    "the folder of the X server's socket": """
        attempt(os.rename, "/tmp/.X11-unix", "/tmp/moved")
        attempt(os.rmdir, "/tmp/.X11-unix")
    """,
    "an X server of its own under the same name": """
        impostor = socket.socket(socket.AF_UNIX)
        attempt(impostor.bind, "/tmp/.X11-unix/X0")
        attempt(impostor.bind, chr(0) + "/tmp/.X11-unix/X0")
    """,
    "the framebuffer": """
        for folder in ("/run/framebuffer", "/session", "/proc/1/root/run/framebuffer"):
            attempt(os.listdir, folder)
    """,
    "the guest server's socket": """
        if "guest.sock" in open("/proc/net/unix").read():
            print("out")
    """,
    "the guest server's code": """
        import pathlib
        for folder in ("/opt/deskrl", "/usr/bin", "/usr/lib/python3"):
            attempt(lambda: (pathlib.Path(folder) / "planted").write_text("x"))
        for path in pathlib.Path("/opt/deskrl/lib/deskrl").rglob("*.py"):
            attempt(path.open, "a")
    """,
    "programs and their libraries": """
        for path in ("/usr/bin/openbox", "/bin/sh", "/usr/bin/python3", "/etc/ld.so.preload", "/etc/ld.so.cache"):
            attempt(open, path, "a")
    """,
    "shared memory of the guest server": """
        if len(open("/proc/sysvipc/shm").readlines()) > 1:
            print("out")
    """,
}
"""Attacks through sockets and files."""


def program(source: str) -> str:
    """Return a complete program."""
    return PRELUDE + textwrap.dedent(source)
