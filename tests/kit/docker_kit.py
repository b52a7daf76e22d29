"""A docker daemon of the tests' own, and images made of this machine's files: one that sleeps, one with a desktop."""

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

from deskrl.actor.desktops.mounts import LIBRARY, guest_sources

DESKTOP = "deskrl-desktop"
"""The image that `desktop.docker.image` names unless told otherwise."""
SLEEPER = "deskrl-test-sleeper"
"""An image whose container does nothing until it is ended, and asks for a volume."""

_START_S = 30.0
_DESKTOP_PACKAGES = (
    *("bash", "coreutils", "dash", "findutils", "grep", "libc-bin", "login", "procps", "util-linux"),
    *("libpython3.11-minimal", "libpython3.11-stdlib", "python3.11-minimal", "python3-minimal"),
    *("dbus-daemon", "dbus-session-bus-common", "fontconfig-config", "fonts-dejavu-core", "libx11-data", "openbox"),
    *("x11-xkb-utils", "xkb-data", "xterm", "xvfb"),
)
_NEEDLESS = re.compile(r"/usr/share/(bug|doc|lintian|locale|man)/|/__pycache__/|-gnu/gconv/")


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


@pytest.fixture(scope="session")
def docker_address() -> Iterator[str]:
    """A daemon that holds both images, one for all tests: DESKRL_DOCKER_DESKTOP's if that names one, else one's own.

    `DESKRL_DOCKER_DESKTOP=unix:///…` is for trying the image that deploy/docker/build.sh has made.
    """
    if given := os.environ.get("DESKRL_DOCKER_DESKTOP"):
        client = docker.DockerClient(given)
        import_sleeper(client)
        client.close()
        yield given
        return
    if reason := why_no_daemon():
        pytest.skip(reason)
    with docker_daemon() as address:
        client = docker.DockerClient(address)
        import_sleeper(client)
        import_desktop(client)
        client.close()
        yield address


def import_sleeper(client: docker.DockerClient) -> None:
    """Put the image SLEEPER into a daemon."""
    files = {"/bin/sh", "/bin/sleep"}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", dereference=True) as tar:
        for name in files | _libraries(files):
            tar.add(Path(name).resolve(), name)
    changes = ['ENTRYPOINT ["/bin/sh", "-c", "exec /bin/sleep infinity"]', "VOLUME /data"]
    client.api.import_image_from_data(archive.getvalue(), repository=SLEEPER, tag="latest", changes=changes)


def import_desktop(client: docker.DockerClient) -> None:
    """Put the image DESKTOP into a daemon: what deploy/docker/Dockerfile installs of packages, as this machine has it.

    Of applications it has xterm alone. For what the Dockerfile itself does, build it (deploy/docker/build.sh).
    """
    listed = subprocess.run(["dpkg", "--listfiles", *_DESKTOP_PACKAGES], capture_output=True, text=True).stdout
    files = {name for name in listed.splitlines() if os.path.isfile(name) and not _NEEDLESS.search(name)}
    files |= _libraries({name for name in files if os.access(name, os.X_OK) or name.endswith(".so")})
    placed = {re.sub("^/(bin|lib|lib64|sbin)/", r"/usr/\1/", name): Path(name).resolve() for name in files}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", dereference=True) as tar:
        _add_tree(tar, "dev etc home/user opt/deskrl/lib proc root run sbin sys tmp usr var/tmp")
        for source, inside in guest_sources().items():
            if inside.is_relative_to(LIBRARY):
                tar.add(source, inside)
        for inside, source in placed.items():
            tar.add(source, inside)
        for name, text in {"passwd": "user:x:1000:1000::/home/user:/bin/bash\n", "group": "user:x:1000:\n"}.items():
            entry = tarfile.TarInfo(f"etc/{name}")
            entry.size, data = len(text), io.BytesIO(text.encode())
            tar.addfile(entry, data)
    entry_point = '["/usr/bin/python3", "-s", "-B", "-m", "deskrl.actor.guest.server"]'
    changes = [f"ENV PYTHONPATH={LIBRARY}", "USER 1000:1000", "WORKDIR /home/user", f"ENTRYPOINT {entry_point}"]
    client.api.import_image_from_data(archive.getvalue(), repository=DESKTOP, tag="latest", changes=changes)


def import_tree(client: docker.DockerClient, name: str) -> None:
    """An image with the empty folders of a machine: what is in them is mounted from this one."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        _add_tree(tar, "etc tmp proc sys dev run runs sbin security usr var/tmp")
    client.api.import_image_from_data(archive.getvalue(), repository=name, tag="latest")


def _add_tree(tar: tarfile.TarFile, folders: str) -> None:
    """The folders, and the links into /usr of a machine of today; docker puts an init of its own into /sbin."""
    for folder in folders.split():
        entry = tarfile.TarInfo(folder)
        entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder.endswith("tmp") else 0o755
        tar.addfile(entry)
    for link in ("bin", "lib", "lib64"):
        entry = tarfile.TarInfo(link)
        entry.type, entry.linkname = tarfile.SYMTYPE, f"usr/{link}"
        tar.addfile(entry)


def _libraries(programs: set[str]) -> set[str]:
    """What they are linked with, and what that is."""
    linked = subprocess.run(["ldd", *programs], capture_output=True, text=True).stdout
    return set(re.findall(r"(/\S+) \(0x", linked))
