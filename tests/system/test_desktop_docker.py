"""Desktops in containers start, reset and are removed, on a real docker daemon that is started for these tests.

The container lifecycle is tested with an image without a desktop, and the desktop with an image of this machine's files
or, if `DESKRL_DOCKER_DESKTOP=unix:///...` names a daemon, with its image `deskrl-desktop` (deploy/docker/build.sh).
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import docker
import pytest
from docker_kit import SLEEPER

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops import docker_client
from deskrl.actor.desktops.base import DesktopError, DesktopGone
from deskrl.actor.desktops.docker_client import Container, reap_containers
from deskrl.actor.desktops.osworld import container_options
from deskrl.actor.desktops.provider_registry import check_usable, make_desktop
from deskrl.core.config import DesktopConfig, DockerConfig, OSWorldConfig
from deskrl.core.errors import UserError


@pytest.fixture
def daemon(docker_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[docker.DockerClient]:
    monkeypatch.setenv("DOCKER_HOST", docker_address)
    docker_client.connect.cache_clear()
    yield docker_client.connect()
    docker_client.connect.cache_clear()


def sleeper(name: str, run_root: Path, *ports: int) -> Container:
    return Container(name, run_root, {"image": SLEEPER, "init": True}, ports)


def config(**keys: Any) -> DesktopConfig:
    return DesktopConfig(provider="docker", docker=DockerConfig(image=SLEEPER), **keys)


def test_concurrent_containers_get_distinct_ports_and_are_removed_with_their_volumes(
    daemon: docker.DockerClient, tmp_path: Path
) -> None:
    async def run() -> None:
        started = [sleeper(f"deskrl-test-{number}", tmp_path, 5000, 9222) for number in range(4)]
        try:
            await asyncio.gather(*(container.start() for container in started))
            addresses = {container.address(port) for container in started for port in (5000, 9222)}
            assert len(addresses) == 8 and {host for host, _ in addresses} == {"127.0.0.1"}
            assert len(daemon.volumes.list()) == 4
        finally:
            await asyncio.gather(*(container.remove() for container in started))
        assert (daemon.containers.list(all=True), daemon.volumes.list()) == ([], [])
        with pytest.raises(DesktopGone):
            started[0].address(5000)

    asyncio.run(run())


def test_a_cancelled_start_leaves_no_container(daemon: docker.DockerClient, tmp_path: Path) -> None:
    async def run() -> None:
        container = sleeper("deskrl-test-cancelled", tmp_path)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(container.start(), 0.001)
        await container.remove()
        assert daemon.containers.list(all=True) == []

    asyncio.run(run())


def test_a_guest_that_never_becomes_ready_is_named_and_its_container_can_be_removed(
    daemon: docker.DockerClient, tmp_path: Path
) -> None:
    async def run() -> None:
        desktop = make_desktop(config(start_timeout_s=1.5), "never", tmp_path)
        with pytest.raises(
            DesktopError, match=r"the guest of deskrl-never-1 was not ready within 1\.5 s: the guest server"
        ):
            await desktop.reset()
        await desktop.close()
        assert daemon.containers.list(all=True) == []

    asyncio.run(run())


def test_a_container_that_exits_is_reported_with_its_log(daemon: docker.DockerClient, tmp_path: Path) -> None:
    async def run() -> None:
        options = {"image": SLEEPER, "entrypoint": ["/bin/sleep", "--no-such-option"]}
        container = Container("deskrl-test-ends", tmp_path, options, [])
        try:
            await container.start()
            daemon.containers.get("deskrl-test-ends").wait()
            with pytest.raises(DesktopGone, match=r"deskrl-test-ends is exited: .*unrecognized option"):
                await container.check_running()
        finally:
            await container.remove()

    asyncio.run(run())


OWNER = """
import asyncio, sys
from pathlib import Path
from deskrl.actor.desktops.docker_client import Container
asyncio.run(Container("deskrl-test-orphan", Path(sys.argv[1]), {"image": sys.argv[2]}, []).start())
"""


def test_only_containers_of_ended_processes_of_the_run_are_reaped(daemon: docker.DockerClient, tmp_path: Path) -> None:
    async def run() -> None:
        mine = sleeper("deskrl-test-mine", tmp_path / "run")
        await mine.start()
        try:
            await asyncio.to_thread(
                partial(subprocess.run, [sys.executable, "-c", OWNER, tmp_path / "run", SLEEPER], check=True)
            )
            assert {container.name for container in daemon.containers.list()} == {
                "deskrl-test-mine",
                "deskrl-test-orphan",
            }
            assert reap_containers(tmp_path / "another-run") == 0
            assert reap_containers(tmp_path / "run") == 1
            assert [container.name for container in daemon.containers.list(all=True)] == ["deskrl-test-mine"]
        finally:
            await mine.remove()

    asyncio.run(run())


def test_a_paused_container_can_be_resumed(daemon: docker.DockerClient, tmp_path: Path) -> None:
    async def run() -> None:
        container = sleeper("deskrl-test-paused", tmp_path)
        await container.start()
        try:
            await container.pause()
            await container.check_running()
            assert daemon.containers.get("deskrl-test-paused").status == "paused"
            await container.unpause()
            assert daemon.containers.get("deskrl-test-paused").status == "running"
        finally:
            await container.remove()

    asyncio.run(run())


def test_a_missing_image_is_reported_with_the_command_that_builds_it(daemon: docker.DockerClient) -> None:
    with pytest.raises(UserError, match=r"docker image no-such-image: not found on this machine \(hint: build it"):
        check_usable(DesktopConfig(provider="docker", docker=DockerConfig(image="no-such-image")))


def test_an_unreachable_daemon_is_reported_with_its_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    docker_client.connect.cache_clear()
    with pytest.raises(UserError, match=r"no docker daemon responds at unix://.*none\.sock \(hint: start it"):
        check_usable(config())


def test_a_user_without_permission_for_docker_gets_a_specific_error(docker_address: str, tmp_path: Path) -> None:
    program = "from deskrl.actor.desktops.docker_client import connect; connect()"
    as_nobody = ["setpriv", "--reuid=65534", "--clear-groups"]
    reachable = Path(docker_address.removeprefix("unix://"))
    reachable.parent.chmod(0o755)
    ended = subprocess.run(
        [*as_nobody, sys.executable, "-c", program],
        env={**os.environ, "DOCKER_HOST": docker_address},
        capture_output=True,
        text=True,
    )
    if "ModuleNotFoundError" in ended.stderr or "Permission denied: '/" in ended.stderr:
        pytest.skip("another user cannot read this interpreter")
    assert "this user may not use the docker daemon at unix://" in ended.stderr


def osworld(disk: Path | None, **keys: Any) -> DesktopConfig:
    limits = {"start_timeout_s": 300.0} | {name: keys.pop(name) for name in ("start_timeout_s",) if name in keys}
    return DesktopConfig(provider="osworld", osworld=OSWorldConfig(disk=disk, **keys), **limits)


def test_unmet_requirements_of_the_provider_osworld_are_reported(daemon: docker.DockerClient, tmp_path: Path) -> None:
    disk = tmp_path / "Ubuntu.qcow2"
    with pytest.raises(UserError, match=r"desktop\.osworld\.disk is unset \(hint: set it to the disk"):
        check_usable(osworld(None))
    with pytest.raises(UserError, match=r"Ubuntu\.qcow2: not found"):
        check_usable(osworld(disk))
    disk.touch()
    with pytest.raises(UserError, match="too short to boot a virtual machine"):
        check_usable(osworld(disk, start_timeout_s=60.0))
    with pytest.raises(UserError, match="docker image nothing: not found"):
        check_usable(osworld(disk, image="nothing"))
    check_usable(osworld(disk, image=SLEEPER))


def test_missing_kvm_is_rejected_only_if_it_is_required(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "disk").touch()
    monkeypatch.setattr("deskrl.actor.desktops.osworld._KVM", tmp_path / "kvm")
    with pytest.raises(UserError, match=r"kvm = require, but .*/kvm does not exist \(hint: use a machine with"):
        check_usable(osworld(tmp_path / "disk", kvm="require"))
    without = container_options(OSWorldConfig(disk=tmp_path / "disk"))
    assert without["environment"]["KVM"] == "N" and without["devices"] == []
    (tmp_path / "kvm").touch()
    assert "KVM" not in container_options(OSWorldConfig(disk=tmp_path / "disk"))["environment"]


def test_the_desktop_image_supports_all_kinds_of_operations(daemon: docker.DockerClient, tmp_path: Path) -> None:
    networked = DockerConfig(network="bridge")

    async def run() -> None:
        config = DesktopConfig(provider="docker", width=800, height=600, docker=networked)
        desktop = make_desktop(config, "desktop", tmp_path / "desktops")
        try:
            await desktop.reset()
            assert (await desktop.screenshot()).size == (800, 600)
            sockets = (await desktop.execute("cat /proc/net/tcp /proc/net/tcp6", shell=True)).stdout
            assert "local_address" in sockets and " 0A " not in sockets, "the guest server must not use TCP"
            await desktop.write_file("~/note", b"text")
            await desktop.launch(["xterm", "-u8", "-e", "sh", "-c", "cat > /home/user/typed"])
            await desktop.wait_for_window("xterm")
            await desktop.act(Action(ActionKind.TYPE, text="<é 漢>\n"))
            await desktop.settle()
            assert (await desktop.read_file("~/typed")).decode() == "<é 漢>\n"
            assert (await desktop.execute("touch /usr/x", shell=True)).returncode != 0
            await desktop.reset()
            with pytest.raises(FileNotFoundError):
                await desktop.read_file("~/note")
        finally:
            await desktop.close()

    asyncio.run(run())
    assert list(tmp_path.iterdir()) == []


def test_the_host_network_is_rejected() -> None:
    with pytest.raises(ValueError, match="must not be host"):
        DockerConfig(network="host")
