#!/usr/bin/env python3
"""A double of VMware's `vmrun`, for machines without VMware: the commands that deskrl uses, with what vmrun prints.

What it prints and how it ends follow VMware's manual and what users report of it; no VMware has been asked.

A machine is a .vmx file in JSON: the `address` at which its guest is to listen, its `snapshots`, and whether VMware
`tools` run in it. While it runs, NAME.pid holds the process of its guest; NAME.disk/ has the files that were written
since the snapshot. Calls about a machine are written down in calls.txt beside it.
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


class Refused(Exception):
    """What vmrun says is wrong."""


def main(words: list[str]) -> int:
    """Do what vmrun does."""
    if words[0] == _GUEST:
        serve(Path(words[1]))
        return 0
    product, command, *rest = words[1:]
    assert words[0] == "-T" and product in ("ws", "fusion"), words
    if command == "list":
        # Real ones know where their machines are; this one is told by the folder in which it is asked.
        running = [vmx for vmx in sorted(Path(os.environ["VMRUN_DOUBLE"]).glob("*.vmx")) if pid_of(vmx)]
        print(f"Total running VMs: {len(running)}", *running, sep="\n")
        return 0
    vmx = Path(rest[0])
    with open(vmx.with_name("calls.txt"), "a", encoding="utf-8") as calls:
        calls.write(" ".join([command, vmx.stem, *rest[1:]]) + "\n")
    try:
        for line in COMMANDS[command](vmx, *rest[1:]):
            print(line)
    except Refused as error:
        print(f"Error: {error}")
        return 255
    return 0


def start(vmx: Path, *options: str) -> list[str]:
    """Bring a machine up."""
    if pid_of(vmx):
        raise Refused("The file is already in use")
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
    """Switch a machine off."""
    if (pid := pid_of(vmx)) is None:
        raise Refused(f"The virtual machine is not powered on: {vmx}")
    os.kill(pid, signal.SIGKILL)
    vmx.with_suffix(".pid").unlink()
    return []


def revert(vmx: Path, name: str) -> list[str]:
    """Back to a snapshot, in which the machine is off."""
    if name not in described(vmx)["snapshots"]:
        raise Refused("The snapshot does not exist")
    if pid_of(vmx):
        stop(vmx)
    shutil.rmtree(vmx.with_suffix(".disk"), ignore_errors=True)
    return []


def list_snapshots(vmx: Path) -> list[str]:
    """Their names, below their number."""
    names = described(vmx)["snapshots"]
    return [f"Total snapshots: {len(names)}", *names]


def address(vmx: Path, *options: str) -> list[str]:
    """The guest's, once it is up; in a machine without a window only if it is waited for."""
    if pid_of(vmx) is None:
        raise Refused(f"The virtual machine is not powered on: {vmx}")
    if "-wait" not in options:
        raise Refused(f"The VMware Tools are not running in the virtual machine: {vmx}")
    host = str(described(vmx)["address"])
    while True:
        with contextlib.suppress(OSError), socket.create_connection((host, PORT), timeout=1):
            if described(vmx)["tools"]:
                return [host]
        time.sleep(0.02)


COMMANDS: dict[str, Any] = {
    "start": start,
    "stop": stop,
    "revertToSnapshot": revert,
    "listSnapshots": list_snapshots,
    "getGuestIPAddress": address,
}


def described(vmx: Path) -> dict[str, Any]:
    """What the machine's file says."""
    if not vmx.is_file():
        raise Refused(f"Cannot open VM: {vmx}, The virtual machine cannot be found")
    found: dict[str, Any] = json.loads(vmx.read_text(encoding="utf-8"))
    return found


def pid_of(vmx: Path) -> int | None:
    """The guest's process, if the machine runs."""
    file = vmx.with_suffix(".pid")
    return int(file.read_text()) if file.exists() else None


class Guest(BaseHTTPRequestHandler):
    """As much of OSWorld's guest server as shows that a machine is up, and what is on its disk."""

    disk: Path

    def do_GET(self) -> None:
        """A screenshot, or the platform."""
        self.answer(200, png() if self.path == "/screenshot" else b"Linux")

    def do_POST(self) -> None:
        """A file written, or read."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/setup/upload":
            boundary = b"--" + self.headers["Content-Type"].partition("boundary=")[2].encode()
            path, data = (part.partition(b"\r\n\r\n")[2][:-2] for part in body.split(boundary)[1:3])
            self.disk.mkdir(exist_ok=True)
            self.place(path.decode()).write_bytes(data)
            self.answer(200, b"written")
            return
        file = self.place(parse_qs(body.decode())["file_path"][0])
        self.answer(200, file.read_bytes()) if file.exists() else self.answer(404, b"File not found")

    def place(self, path: str) -> Path:
        """Where a file of the guest lies."""
        return self.disk / quote(re.sub("^~", "/home/user", path), safe="")

    def answer(self, status: int, data: bytes) -> None:
        """Send a reply."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def serve(vmx: Path) -> None:
    """Be the guest of a machine until it is switched off."""
    Guest.disk = vmx.with_suffix(".disk")
    HTTPServer((str(described(vmx)["address"]), PORT), Guest).serve_forever()


def png() -> bytes:
    """A black picture of one pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0\0\0\0")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
