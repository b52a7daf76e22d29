#!/usr/bin/env python3
"""Fake of VMware's `vmrun` for machines without VMware: the commands that deskrl uses, with vmrun's output.

Output and exit status follow VMware's manual and users' reports. They were not compared with a real VMware.

A machine is a JSON file named NAME.vmx with these keys: `address` at which its guest listens, `snapshots`, and `tools`,
which states whether VMware Tools run in it. While it runs, NAME.pid contains the process id of its guest. NAME.disk/
contains the files written since the snapshot. Calls that name a machine are appended to calls.txt beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

PORT = 5000
_GUEST = "--guest"


class VmrunError(Exception):
    """Error that vmrun reports."""


def main(words: list[str]) -> int:
    """Execute one vmrun command and return its exit status."""
    if words[0] == _GUEST:
        serve(Path(words[1]))
        return 0
    product, command, *rest = words[1:]
    assert words[0] == "-T" and product in ("ws", "fusion"), words
    if command == "list":
        # The real vmrun knows all machines; the fake uses the folder in FAKE_VMRUN_DIR.
        running = [vmx for vmx in sorted(Path(os.environ["FAKE_VMRUN_DIR"]).glob("*.vmx")) if pid_of(vmx)]
        print(f"Total running VMs: {len(running)}", *running, sep="\n")
        return 0
    vmx = Path(rest[0])
    with open(vmx.with_name("calls.txt"), "a", encoding="utf-8") as calls:
        calls.write(" ".join([command, vmx.stem, *rest[1:]]) + "\n")
    try:
        for line in COMMANDS[command](vmx, *rest[1:]):
            print(line)
    except VmrunError as error:
        print(f"Error: {error}")
        return 255
    return 0


def start(vmx: Path, *options: str) -> list[str]:
    """Start a machine."""
    if pid_of(vmx):
        raise VmrunError("The file is already in use")
    guest = subprocess.Popen(
        [sys.executable, __file__, _GUEST, str(vmx)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    vmx.with_suffix(".pid").write_text(str(guest.pid))
    return []


def stop(vmx: Path, *options: str) -> list[str]:
    """Stop a machine."""
    if (pid := pid_of(vmx)) is None:
        raise VmrunError(f"The virtual machine is not powered on: {vmx}")
    os.kill(pid, signal.SIGKILL)
    vmx.with_suffix(".pid").unlink()
    return []


def revert(vmx: Path, name: str) -> list[str]:
    """Revert to a snapshot in which the machine is off."""
    if name not in describe(vmx)["snapshots"]:
        raise VmrunError("The snapshot does not exist")
    if pid_of(vmx):
        stop(vmx)
    shutil.rmtree(vmx.with_suffix(".disk"), ignore_errors=True)
    return []


def list_snapshots(vmx: Path) -> list[str]:
    """Return the number of snapshots, then their names."""
    names = describe(vmx)["snapshots"]
    return [f"Total snapshots: {len(names)}", *names]


def address(vmx: Path, *options: str) -> list[str]:
    """Return the guest's IP address once it responds; fails without `-wait`, as for machines without a window."""
    if pid_of(vmx) is None:
        raise VmrunError(f"The virtual machine is not powered on: {vmx}")
    if "-wait" not in options:
        raise VmrunError(f"The VMware Tools are not running in the virtual machine: {vmx}")
    host = str(describe(vmx)["address"])
    while True:
        with contextlib.suppress(OSError), socket.create_connection((host, PORT), timeout=1):
            if describe(vmx)["tools"]:
                return [host]
        time.sleep(0.02)


COMMANDS: dict[str, Any] = {
    "start": start,
    "stop": stop,
    "revertToSnapshot": revert,
    "listSnapshots": list_snapshots,
    "getGuestIPAddress": address,
}


def describe(vmx: Path) -> dict[str, Any]:
    """Read the machine's file."""
    if not vmx.is_file():
        raise VmrunError(f"Cannot open VM: {vmx}, The virtual machine cannot be found")
    description: dict[str, Any] = json.loads(vmx.read_text(encoding="utf-8"))
    return description


def pid_of(vmx: Path) -> int | None:
    """Return the process id of the guest; None if the machine is off."""
    file = vmx.with_suffix(".pid")
    return int(file.read_text()) if file.exists() else None


class Guest(BaseHTTPRequestHandler):
    """Minimal guest server: screenshot, platform, and files on the machine's disk."""

    disk: Path

    def do_GET(self) -> None:
        """Serve a screenshot or the platform."""
        answers = {"/screenshot": png(), "/platform": b"Linux"}
        self.answer(200 if self.path in answers else 404, answers.get(self.path, b"Not found"))

    def do_POST(self) -> None:
        """Write or read a file."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/setup/upload":
            boundary = b"--" + self.headers["Content-Type"].partition("boundary=")[2].encode()
            path, data = (part.partition(b"\r\n\r\n")[2][:-2] for part in body.split(boundary)[1:3])
            self.disk.mkdir(exist_ok=True)
            self.host_path(path.decode()).write_bytes(data)
            self.answer(200, b"written")
            return
        file = self.host_path(parse_qs(body.decode())["file_path"][0])
        self.answer(200, file.read_bytes()) if file.exists() else self.answer(404, b"File not found")

    def host_path(self, path: str) -> Path:
        """Return the host path of a file of the guest."""
        return self.disk / quote(re.sub("^~", "/home/user", path), safe="")

    def answer(self, status: int, data: bytes) -> None:
        """Send a response."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def serve(vmx: Path) -> None:
    """Run the guest server of a machine until it is stopped."""
    Guest.disk = vmx.with_suffix(".disk")
    HTTPServer((str(describe(vmx)["address"]), PORT), Guest).serve_forever()


def png() -> bytes:
    """Return a PNG image of one black pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0\0\0\0")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
