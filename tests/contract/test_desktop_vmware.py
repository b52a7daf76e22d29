"""The provider `vmware` implements the desktop interface, tested with a fake `vmrun` (tests/kit/fake_vmrun.py).

The fake does not show the latencies of real virtual machines or other behaviour of VMware.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_vmrun
import pytest

from deskrl.actor.desktops.base import DesktopError, DesktopGone
from deskrl.actor.desktops.provider_registry import check_usable, make_desktop, reap_desktops
from deskrl.core.config import DesktopConfig, VMwareConfig
from deskrl.core.errors import UserError

VMRUN = Path(fake_vmrun.__file__)


class Host:
    """Folder with virtual machines of the fake `vmrun`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_root = folder / "run" / "desktops"

    def machine(self, name: str, **changes: Any) -> Path:
        """Create a machine whose guest listens on a separate loopback address."""
        description = {"address": _address(), "snapshots": ["init_state"], "tools": True, **changes}
        vmx = self.folder / f"{name}.vmx"
        vmx.write_text(json.dumps(description))
        return vmx

    def config(self, *machines: Path, start_timeout_s: float = 30.0, num_envs: int = 1, **keys: Any) -> DesktopConfig:
        """Return the configuration of desktops in these machines."""
        vmware = VMwareConfig.model_validate({"machines": machines, "vmrun": str(VMRUN), **keys})
        return DesktopConfig(provider="vmware", num_envs=num_envs, start_timeout_s=start_timeout_s, vmware=vmware)

    def calls(self) -> list[str]:
        """Return the calls of vmrun that name a machine, without checks of snapshots."""
        lines = (self.folder / "calls.txt").read_text().splitlines()
        return [line for line in lines if not line.startswith("listSnapshots")]

    def running(self) -> list[str]:
        """Return the names of running machines."""
        return [file.stem for file in sorted(self.folder.glob("*.pid"))]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """Provide a host whose machines are stopped after the test."""
    monkeypatch.setenv("FAKE_VMRUN_DIR", str(tmp_path))
    yield Host(tmp_path)
    for file in tmp_path.glob("*.pid"):
        fake_vmrun.stop(file.with_suffix(".vmx"))


def _address() -> str:
    return f"127.{random.randint(1, 254)}.{random.randint(0, 255)}.{random.randint(1, 254)}"


def test_a_reset_reverts_to_the_snapshot_and_close_stops_the_machine(host: Host) -> None:
    async def run() -> None:
        desktop = make_desktop(host.config(host.machine("a")), "d", host.run_root)
        await desktop.start()
        assert await desktop.is_alive() and (await desktop.screenshot()).size == (1, 1)
        await desktop.write_file("~/left", b"by an episode")
        assert await desktop.read_file("~/left") == b"by an episode"
        await desktop.reset()
        with pytest.raises(FileNotFoundError):
            await desktop.read_file("~/left")
        await desktop.close()
        await desktop.close()
        with pytest.raises(DesktopGone, match="the virtual machine is not running"):
            _ = desktop.address

    asyncio.run(run())
    boot = ["revertToSnapshot a init_state", "start a nogui", "getGuestIPAddress a -wait"]
    assert host.calls() == [*boot, *boot, "stop a hard"] and host.running() == []


def test_a_machine_serves_one_desktop_at_a_time_across_runs(host: Host) -> None:
    async def run() -> None:
        machines = host.machine("a"), host.machine("b")
        first = make_desktop(host.config(*machines), "one", host.run_root)
        second = make_desktop(host.config(*machines), "two", host.folder / "another run")
        third = make_desktop(host.config(*machines, start_timeout_s=0.3), "three", host.run_root)
        await asyncio.gather(first.start(), second.start())
        assert first.address != second.address and host.running() == ["a", "b"]
        with pytest.raises(DesktopError, match="none of 2 virtual machines is free"):
            await third.start()
        await first.close()
        await third.close()
        await second.close()

    asyncio.run(run())


def test_a_machine_that_reports_no_ip_address_is_named_and_stopped(host: Host) -> None:
    async def run() -> None:
        desktop = make_desktop(host.config(host.machine("a", tools=False), start_timeout_s=1.5), "d", host.run_root)
        with pytest.raises(DesktopError, match=r"a\.vmx reported no IP address within 1\.5 s \(hint: possibly"):
            await desktop.start()
        assert host.running() == ["a"]
        await desktop.close()

    asyncio.run(run())
    assert host.running() == []


def test_an_error_of_vmrun_is_raised_as_the_desktops_error(host: Host) -> None:
    machine = host.machine("a")
    desktop = make_desktop(host.config(machine), "d", host.run_root)
    host.machine("a", snapshots=[])
    with pytest.raises(DesktopError, match=r"^vmrun revertToSnapshot: The snapshot does not exist$"):
        asyncio.run(desktop.start())
    asyncio.run(desktop.close())


def test_a_machine_of_a_killed_actor_is_stopped_when_the_run_starts_its_next_actor(host: Host) -> None:
    config = host.config(host.machine("a"), host.machine("b"))
    program = (
        "import asyncio, os, sys; from pathlib import Path\n"
        "from deskrl.actor.desktops.provider_registry import make_desktop\n"
        "from deskrl.core.config import DesktopConfig\n"
        "config = DesktopConfig.model_validate_json(sys.argv[1])\n"
        "asyncio.run(make_desktop(config, 'd', Path(sys.argv[2])).start())\n"
        "os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, config.model_dump_json(), str(host.run_root)], check=False)
    assert killed.returncode == -9 and len(host.running()) == 1
    assert reap_desktops(config, host.folder / "another run") == 0 and len(host.running()) == 1
    assert reap_desktops(config, host.run_root) == 1 and host.running() == []
    assert reap_desktops(config, host.run_root) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vmrun": "no-such-vmrun"}, r"no-such-vmrun: program not found \(hint: install VMware"),
        ({"num_envs": 2}, r"num_envs = 2, but desktop\.vmware\.machines lists 1 virtual machines \(hint: list a \.vmx"),
        ({"snapshot": "clean"}, r"a\.vmx has no snapshot clean: it has init_state \(hint: create it \(vmrun snapshot "),
        ({"machines": ["/no/such.vmx"]}, r"desktop\.vmware\.machines: /no/such\.vmx: not found"),
    ],
)
def test_unmet_requirements_are_reported_in_one_line(host: Host, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        check_usable(host.config(**{"machines": [host.machine("a")], **changes}))
    assert "\n" not in str(raised.value)
