"""deploy/images/Dockerfile builds from Debian's packages and this machine's wheels, and a role serves in the image.

Only the target `replay` is built, the common base of all targets; the others add gigabytes of applications or engines.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from docker_kit import daemon_unavailable_reason, docker_daemon

ROOT = Path(__file__).parents[2]
BASE, IMAGE = "deskrl-test-base", "deskrl/replay"
TIMEOUT_S = 60.0
CONFIG = 'runs = "/runs"\nname = "served"\n'


def image_unavailable_reason() -> str:
    """Return why the image cannot be built on this machine; empty if no obstacle is known."""
    if sys.version_info[:2] != (3, 11):
        return "the image has Python 3.11, and wheels can be built for this version of Python only"
    missing = [
        name for name in ("docker", "debootstrap") if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    return daemon_unavailable_reason() or (f"not installed: {', '.join(missing)}" if missing else "")


pytestmark = pytest.mark.skipif(bool(image_unavailable_reason()), reason=image_unavailable_reason())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Root file system of Debian with Python, and the wheels of all dependencies in /wheels."""
    root = tmp_path_factory.mktemp("base") / "root"
    subprocess.run(["debootstrap", "--variant=minbase", "--include=python3,python3-pip", "bookworm", root], check=True)
    build_requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--wheel-dir", root / "wheels", ROOT], check=True)
    subprocess.run([*pip, "wheel", "--wheel-dir", root / "wheels", *build_requirements], check=True)
    for built in (root / "wheels").glob("deskrl-*"):
        built.unlink()  # built by the Dockerfile
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def address(base: Path) -> Iterator[str]:
    """Address of a Docker daemon that has built the image without network access."""
    with docker_daemon() as address:
        environment = {**os.environ, "DOCKER_HOST": address, "DOCKER_BUILDKIT": "0"}
        with subprocess.Popen(["tar", "--directory", base, "--create", "."], stdout=subprocess.PIPE) as archive:
            command = ["docker", "import", "-", BASE]
            subprocess.run(command, stdin=archive.stdout, stdout=subprocess.DEVNULL, env=environment, check=True)
        pip_args = "--no-index --find-links /wheels"
        arguments = ["--build-arg", f"BASE={BASE}", "--build-arg", f"PIP_ARGS={pip_args}", "--network", "none"]
        command = ["docker", "build", "--file", "deploy/images/Dockerfile", "--target", "replay", "--tag", IMAGE]
        built = subprocess.run(
            [*command, *arguments, "."], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
        yield address


def test_a_role_in_its_image_serves_as_an_unprivileged_user_and_stops_on_sigterm(address: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(CONFIG)
    tmp_path.chmod(0o755)
    client = docker.DockerClient(address)
    mounts = {str(tmp_path): {"bind": "/etc/deskrl", "mode": "ro"}}
    container = client.containers.run(
        IMAGE,
        ["replay", "/etc/deskrl/run.toml"],
        detach=True,
        read_only=True,
        tmpfs={"/runs": "mode=1777"},
        volumes=mounts,
    )
    try:
        deadline_s = time.monotonic() + TIMEOUT_S
        while container.exec_run(["deskrl", "health", "/etc/deskrl/run.toml", "replay"]).exit_code != 0:
            assert time.monotonic() < deadline_s, container.logs().decode()
        assert container.exec_run(["id", "-u"]).output == b"1000\n"
        container.kill("SIGTERM")
        assert container.wait()["StatusCode"] == 0, container.logs().decode()
    finally:
        container.remove(force=True)
        client.close()
