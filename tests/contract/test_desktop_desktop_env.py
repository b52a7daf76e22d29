"""The provider `desktop_env` keeps the contract of desktops, tested with a double of desktop-env and its clouds.

The double (tests/kit/desktop_env_double) shows neither the latencies nor other behaviour of a cloud. The provider
classes of desktop-env itself are called in tests/long/test_desktop_env_providers.py.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cloud_kit import Cloud

from deskrl.actor.desktops.base import DesktopError, DesktopGone
from deskrl.actor.desktops.provider_registry import check_usable, make_desktop, reap_desktops
from deskrl.core.config import DesktopConfig
from deskrl.core.errors import UserError

AWS = {"provider": "aws", "region": "us-east-1", "snapshot": "ami-1"}


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Provide a cloud whose machines are removed after the test."""
    with Cloud(tmp_path, monkeypatch) as cloud:
        cloud.use_double_of_desktop_env()
        yield cloud


def desktop_config(options: dict[str, Any], start_timeout_s: float = 30.0, num_envs: int = 1) -> DesktopConfig:
    return DesktopConfig(
        provider="desktop_env", num_envs=num_envs, start_timeout_s=start_timeout_s, provider_options=options
    )


def wait_for_call(cloud: Cloud, call: str) -> None:
    while call not in cloud.calls():
        time.sleep(0.05)


def test_a_created_machine_is_replaced_by_a_reset_and_removed_by_close(cloud: Cloud) -> None:
    async def run() -> None:
        desktop = make_desktop(desktop_config(AWS), "d", cloud.run_root)
        await desktop.start()
        assert await desktop.is_alive() and (await desktop.screenshot()).size == (1, 1)
        first = desktop.address
        await desktop.write_file("~/left", b"by an episode")
        await desktop.reset()
        assert desktop.address != first and await desktop.is_alive()
        with pytest.raises(FileNotFoundError):
            await desktop.read_file("~/left")
        await desktop.close()
        await desktop.close()
        with pytest.raises(DesktopGone, match="the virtual machine is not running"):
            _ = desktop.address

    asyncio.run(run())
    assert cloud.calls() == [
        *("create m-1 us-east-1-1280x720", "start m-1", "remove m-1"),
        *("create m-2 ami-1", "start m-2", "remove m-2"),
    ]
    assert cloud.running() == [] and cloud.lock_files("aws") == []


def test_a_listed_machine_serves_one_desktop_at_a_time_and_begins_at_its_snapshot(cloud: Cloud) -> None:
    machines = [cloud.add_machine("a"), cloud.add_machine("b")]
    config = desktop_config({"provider": "virtualbox", "machines": machines})

    async def run() -> None:
        first = make_desktop(config, "one", cloud.run_root)
        second = make_desktop(config, "two", cloud.folder / "another run")
        third = make_desktop(config.model_copy(update={"start_timeout_s": 0.3}), "three", cloud.run_root)
        await asyncio.gather(first.start(), second.start())
        assert first.address != second.address and cloud.running() == ["a", "b"]
        with pytest.raises(DesktopError, match="none of 2 virtual machines is free"):
            await third.start()
        await asyncio.gather(first.close(), second.close(), third.close())
        assert cloud.running() == []
        again = make_desktop(config, "one", cloud.run_root)
        await again.start()
        await again.close()

    asyncio.run(run())
    boot = ["start a", "revert a init_state", "start a", "stop a"]
    calls = [call for call in cloud.calls() if call.split()[1] == "a"]
    assert calls in (boot, boot + boot) and cloud.running() == []


def test_what_the_cloud_answers_is_the_fault_of_the_desktop_in_one_line(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    desktop = make_desktop(desktop_config(AWS), "d", cloud.run_root)
    monkeypatch.setenv("FAKE_CLOUD_FAULT", "start_emulator")

    async def run() -> None:
        expected = "^aws: start of m-1: RuntimeError: the cloud's answer to start_emulator$"
        with pytest.raises(DesktopError, match=expected):
            await desktop.start()
        await desktop.close()

    asyncio.run(run())
    assert cloud.running() == []


@pytest.mark.parametrize("method", ["get_vm_path", "revert_to_snapshot"])
def test_a_machine_whose_creation_is_cancelled_is_removed(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    async def run() -> None:
        desktop = make_desktop(desktop_config(AWS), "d", cloud.run_root)
        if method == "revert_to_snapshot":
            await desktop.start()
        monkeypatch.setenv("FAKE_CLOUD_FAULT", f"hang-{method}")
        start = asyncio.create_task(desktop.reset())
        await asyncio.to_thread(wait_for_call, cloud, f"hang {method}")
        start.cancel()
        await asyncio.wait({start})
        assert len(cloud.running()) == 1
        await desktop.close()

    asyncio.run(run())
    assert cloud.running() == [] and cloud.lock_files("aws") == []


def test_a_machine_that_cannot_be_stopped_is_stopped_by_the_next_actor(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = desktop_config(AWS)

    async def run() -> None:
        desktop = make_desktop(config, "d", cloud.run_root)
        await desktop.start()
        monkeypatch.setenv("FAKE_CLOUD_FAULT", "stop_emulator")
        await desktop.close()

    asyncio.run(run())
    assert cloud.running() == ["m-1"]
    assert reap_desktops(config, cloud.run_root) == 0 and cloud.running() == ["m-1"]
    monkeypatch.delenv("FAKE_CLOUD_FAULT")
    assert reap_desktops(config, cloud.run_root) == 1 and cloud.running() == []


@pytest.mark.parametrize("fault", ["", "hang-get_vm_path"])
def test_no_machine_of_a_killed_actor_remains(cloud: Cloud, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    config = desktop_config(AWS)
    monkeypatch.setenv("FAKE_CLOUD_FAULT", fault)
    program = (
        "import asyncio, os, sys, threading, time; from pathlib import Path\n"
        "from deskrl.actor.desktops.provider_registry import make_desktop\n"
        "from deskrl.core.config import DesktopConfig\n"
        "calls = Path(os.environ['FAKE_CLOUD_DIR']) / 'calls.txt'\n"
        "def kill():\n"
        "    while not (calls.exists() and 'hang' in calls.read_text()): time.sleep(0.02)\n"
        "    os.kill(os.getpid(), 9)\n"
        "threading.Thread(target=kill, daemon=True).start()\n"
        "config = DesktopConfig.model_validate_json(sys.argv[1])\n"
        "asyncio.run(make_desktop(config, 'd', Path(sys.argv[2])).start())\n"
        "os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", program, config.model_dump_json(), str(cloud.run_root)]
    assert subprocess.run(command, check=False).returncode == -9
    assert cloud.running() == ["m-1"]
    if not fault:
        assert reap_desktops(config, cloud.folder / "another run") == 0 and cloud.running() == ["m-1"]
    deadline_s = time.monotonic() + 20  # a process that creates the machine outlives the actor, and removes it
    while reap_desktops(config, cloud.run_root) == 0 and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert cloud.running() == [] and cloud.lock_files("aws") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"provider": "gcp"}, r"gcp: desktop-env 1\.0\.2 has only empty files for this provider"),
        ({"provider": "aws"}, r"aws needs region, and snapshot, the AMI of OSWorld's machine in that region"),
        ({"provider": "aws", "region": "x", "snapshot": "ami-1", "machines": ["i-1"]}, r"aws takes no machines"),
        ({"provider": "azure"}, r"azure needs machines: desktop-env does not create them"),
        (
            {"provider": "azure", "machines": ["group/name"]},
            r"provider azure needs the module azure_is_not_installed \(hint: \S+/bin/python -m pip install azure-id",
        ),
        (
            {"provider": "aliyun"},
            r"desktop-env cannot use aliyun: check: OSError: ALIYUN_REGION must be set in the env",
        ),
        ({"provider": "virtualbox", "machines": ["/no/such.vbox"]}, r"machines: /no/such\.vbox: not found"),
        (
            {"provider": "virtualbox", "machines": ["a", "./a"]},
            r"num_envs = 2, but .*machines lists 1 virtual machines",
        ),
    ],
)
def test_unmet_requirements_are_reported_in_one_line(cloud: Cloud, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        check_usable(desktop_config(options, num_envs=len(options.get("machines", "1"))))
    assert "\n" not in str(raised.value)


def test_a_missing_environment_is_reported_with_the_command_that_installs_it(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DESKRL_EVALUATORS", str(cloud.folder / "none"))
    with pytest.raises(UserError, match=r"desktop-env is not installed \(hint: deskrl evaluators install\)"):
        check_usable(desktop_config(AWS))


def test_the_lock_file_names_the_run_and_the_machine(cloud: Cloud) -> None:
    async def run() -> None:
        desktop = make_desktop(desktop_config(AWS), "d", cloud.run_root)
        await desktop.start()
        (file,) = cloud.lock_files("aws")
        assert json.loads(file.read_text()) == {"run": str(cloud.run_root), "machine": "m-1"}
        await desktop.close()

    asyncio.run(run())
