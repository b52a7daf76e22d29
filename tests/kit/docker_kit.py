"""Docker daemon for tests, and images made of this machine's files: one that sleeps, and one with a desktop."""

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
import pytest

from deskrl.actor.desktops.mounts import GUEST_LIBRARY, guest_sources

DESKTOP = "deskrl-desktop"
"""Default image of `desktop.docker.image`."""
SLEEPER = "deskrl-test-sleeper"
"""Image whose containers sleep until they are stopped. It declares a volume."""

_START_TIMEOUT_S = 60.0
_DESKTOP_PACKAGES = (
    *("bash", "coreutils", "dash", "findutils", "grep", "libc-bin", "login", "procps", "util-linux"),
    *("libpython3.11-minimal", "libpython3.11-stdlib", "python3.11-minimal", "python3-minimal"),
    *("dbus-daemon", "dbus-session-bus-common", "fontconfig-config", "fonts-dejavu-core", "libx11-data", "openbox"),
    *("x11-xkb-utils", "xkb-data", "xterm", "xvfb"),
)
_UNNEEDED_FILES = re.compile(r"/usr/share/(bug|doc|lintian|locale|man)/|/__pycache__/|-gnu/gconv/")


def daemon_unavailable_reason() -> str:
    """Return why no daemon can be started here; empty if no obstacle is known."""
    if shutil.which("dockerd") is None:
        return "dockerd is not installed"
    return "dockerd requires root" if os.geteuid() else ""


@contextmanager
def docker_daemon() -> Iterator[str]:
    """Start a daemon that keeps its data in a temporary folder, and yield its address.

    Raises:
        RuntimeError: the daemon did not start; the message is the last line of its log.
    """
    with tempfile.TemporaryDirectory(prefix="deskrl-dockerd-", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        address = f"unix://{root / 'docker.sock'}"
        folders = [f"--data-root={root / 'data'}", f"--exec-root={root / 'exec'}", f"--pidfile={root / 'pid'}"]
        with open(root / "log", "wb") as log:
            process = subprocess.Popen(["dockerd", f"--host={address}", *folders], stdout=log, stderr=log)
        try:
            _wait_for(address, process, root / "log")
            yield address
        finally:
            process.terminate()
            process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            docker.DockerClient(address).close()
            return
        except docker.errors.DockerException as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text(errors="replace").splitlines()[-1]) from error
        time.sleep(0.05)


@pytest.fixture(scope="session")
def docker_address() -> Iterator[str]:
    """Address of a daemon that has both images, shared by all tests of the session.

    `DESKRL_DOCKER_DESKTOP=unix:///...` selects a running daemon with the image that deploy/docker/build.sh builds.
    Otherwise a daemon is started.
    """
    if given := os.environ.get("DESKRL_DOCKER_DESKTOP"):
        client = docker.DockerClient(given)
        import_sleeper(client)
        client.close()
        yield given
        return
    if reason := daemon_unavailable_reason():
        pytest.skip(reason)
    with docker_daemon() as address:
        client = docker.DockerClient(address)
        import_sleeper(client)
        import_desktop(client)
        client.close()
        yield address


def import_sleeper(client: docker.DockerClient) -> None:
    """Import the image SLEEPER into a daemon."""
    files = {"/bin/sh", "/bin/sleep"}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", dereference=True) as tar:
        for name in files | _libraries(files):
            tar.add(Path(name).resolve(), name)
    changes = ['ENTRYPOINT ["/bin/sh", "-c", "exec /bin/sleep infinity"]', "VOLUME /data"]
    client.api.import_image_from_data(archive.getvalue(), repository=SLEEPER, tag="latest", changes=changes)


def import_desktop(client: docker.DockerClient) -> None:
    """Import the image DESKTOP into a daemon, made of this machine's copies of the packages in the Dockerfile.

    xterm is its only application. To test the Dockerfile itself, build the image (deploy/docker/build.sh).
    """
    listed = subprocess.run(["dpkg", "--listfiles", *_DESKTOP_PACKAGES], capture_output=True, text=True).stdout
    files = {name for name in listed.splitlines() if os.path.isfile(name) and not _UNNEEDED_FILES.search(name)}
    files |= _libraries({name for name in files if os.access(name, os.X_OK) or name.endswith(".so")})
    placed = {re.sub("^/(bin|lib|lib64|sbin)/", r"/usr/\1/", name): Path(name).resolve() for name in files}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", dereference=True) as tar:
        _add_tree(tar, "dev etc home/user opt/deskrl/lib proc root run sbin sys tmp usr var/tmp")
        for source, inside in guest_sources().items():
            if inside.is_relative_to(GUEST_LIBRARY):
                tar.add(source, inside)
        for inside, source in placed.items():
            tar.add(source, inside)
        for name, text in {"passwd": "user:x:1000:1000::/home/user:/bin/bash\n", "group": "user:x:1000:\n"}.items():
            entry = tarfile.TarInfo(f"etc/{name}")
            entry.size, data = len(text), io.BytesIO(text.encode())
            tar.addfile(entry, data)
    entry_point = '["/usr/bin/python3", "-s", "-B", "-m", "deskrl.actor.guest"]'
    changes = [f"ENV PYTHONPATH={GUEST_LIBRARY}", "USER 0:0", "WORKDIR /", f"ENTRYPOINT {entry_point}"]
    client.api.import_image_from_data(archive.getvalue(), repository=DESKTOP, tag="latest", changes=changes)


def import_tree(client: docker.DockerClient, name: str) -> None:
    """Import an image of empty system folders, into which this machine's folders can be mounted."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        _add_tree(tar, "etc tmp proc sys dev run runs sbin security usr var/tmp")
    client.api.import_image_from_data(archive.getvalue(), repository=name, tag="latest")


def _add_tree(tar: tarfile.TarFile, folders: str) -> None:
    """Add folders and the links of a merged /usr, except /sbin, in which docker places its own init."""
    for folder in folders.split():
        entry = tarfile.TarInfo(folder)
        entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder.endswith("tmp") else 0o755
        tar.addfile(entry)
    for link in ("bin", "lib", "lib64"):
        entry = tarfile.TarInfo(link)
        entry.type, entry.linkname = tarfile.SYMTYPE, f"usr/{link}"
        tar.addfile(entry)


def _libraries(programs: set[str]) -> set[str]:
    """Return the shared libraries of programs, including indirect dependencies."""
    linked = subprocess.run(["ldd", *programs], capture_output=True, text=True).stdout
    return set(re.findall(r"(/\S+) \(0x", linked))
