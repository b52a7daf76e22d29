"""deploy/images/Dockerfile, built for real from Debian's packages and this machine's wheels, and a role run in it.

Only the target `replay`, which every other target begins as: those add gigabytes of applications or engines.
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
from docker_kit import docker_daemon, why_no_daemon

ROOT = Path(__file__).parents[2]
BASE, IMAGE = "deskrl-test-base", "deskrl/replay"
PATIENCE_S = 60.0
CONFIG = 'runs = "/runs"\nname = "served"\n'


def why_no_image() -> str:
    if sys.version_info[:2] != (3, 11):
        return "wheels are gathered for this Python, and bookworm's is 3.11"
    missing = [
        name for name in ("docker", "debootstrap") if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    return why_no_daemon() or (f"not installed: {', '.join(missing)}" if missing else "")


pytestmark = pytest.mark.skipif(bool(why_no_image()), reason=why_no_image())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Debian with Python and, in /wheels, whatever pip will ask for."""
    root = tmp_path_factory.mktemp("base") / "root"
    subprocess.run(["debootstrap", "--variant=minbase", "--include=python3,python3-pip", "bookworm", root], check=True)
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--wheel-dir", root / "wheels", ROOT], check=True)
    subprocess.run([*pip, "wheel", "--wheel-dir", root / "wheels", *needs], check=True)
    for built in (root / "wheels").glob("deskrl-*"):
        built.unlink()  # that is what the image is to build
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def address(base: Path) -> Iterator[str]:
    """A daemon that has built the image, without a network."""
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


def test_a_role_serves_in_its_image_as_its_own_user_and_ends_when_asked_to(address: str, tmp_path: Path) -> None:
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
        deadline_s = time.monotonic() + PATIENCE_S
        while container.exec_run(["deskrl", "health", "/etc/deskrl/run.toml", "replay"]).exit_code != 0:
            assert time.monotonic() < deadline_s, container.logs().decode()
        assert container.exec_run(["id", "-u"]).output == b"1000\n"
        container.kill("SIGTERM")
        assert container.wait()["StatusCode"] == 0, container.logs().decode()
    finally:
        container.remove(force=True)
        client.close()
