"""A docker daemon of the tests' own, with an image that holds next to nothing: `sh`, `sleep` and their libraries."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import docker

SLEEPER = "deskrl-test-sleeper"
"""An image whose container does nothing until it is ended, and asks for a volume."""

_START_S = 30.0


def why_no_daemon() -> str:
    """Why no daemon can be started here; empty if one can, as far as a glance tells."""
    if shutil.which("dockerd") is None:
        return "dockerd is not installed"
    return "dockerd needs root" if os.geteuid() else ""


@contextmanager
def docker_daemon() -> Iterator[str]:
    """The address of a daemon that keeps all that is its own in a temporary folder.

    Raises:
        RuntimeError: it does not start here; the last that it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="deskrl-dockerd-", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        address = f"unix://{root / 'docker.sock'}"
        places = [f"--data-root={root / 'data'}", f"--exec-root={root / 'exec'}", f"--pidfile={root / 'pid'}"]
        with open(root / "log", "wb") as log:
            process = subprocess.Popen(["dockerd", f"--host={address}", *places], stdout=log, stderr=log)
        try:
            _wait_for(address, process, root / "log")
            yield address
        finally:
            process.terminate()
            process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            docker.DockerClient(address).close()
            return
        except docker.errors.DockerException as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text(errors="replace").splitlines()[-1]) from error
        time.sleep(0.05)


def import_sleeper(client: docker.DockerClient) -> None:
    """Put the image SLEEPER into a daemon."""
    files = {"/bin/sh", "/bin/sleep"}
    linked = subprocess.run(["ldd", *files], capture_output=True, text=True, check=True).stdout
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", dereference=True) as tar:
        for name in files | set(re.findall(r"(/\S+) \(0x", linked)):
            tar.add(Path(name).resolve(), name)
    changes = ['ENTRYPOINT ["/bin/sh", "-c", "exec /bin/sleep infinity"]', "VOLUME /data"]
    client.api.import_image_from_data(archive.getvalue(), repository=SLEEPER, tag="latest", changes=changes)


def import_tree(client: docker.DockerClient, name: str) -> None:
    """An image with the empty folders of a machine: what is in them is mounted from this one."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for folder in ("etc", "tmp", "proc", "sys", "dev", "run", "runs", "security", "sbin", "usr", "var/tmp"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder.endswith("tmp") else 0o755
            tar.addfile(entry)
        for link in ("bin", "lib", "lib64"):
            entry = tarfile.TarInfo(link)
            entry.type, entry.linkname = tarfile.SYMTYPE, f"usr/{link}"
            tar.addfile(entry)
    client.api.import_image_from_data(archive.getvalue(), repository=name, tag="latest")
