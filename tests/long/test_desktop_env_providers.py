"""The provider classes of desktop-env serve as deskrl's desktops, tested with doubles of their clouds and VirtualBox.

The doubles (tests/kit/cloud_doubles) have the names and values that the classes use. No cloud and no VirtualBox was
called, so that nothing is said of their behaviour, latencies and prices.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from cloud_kit import Cloud

from deskrl.actor.desktops.provider_registry import make_desktop
from deskrl.actor.osworld_evaluators.evaluator_environment import interpreter_path
from deskrl.core.config import DesktopConfig

pytestmark = pytest.mark.skipif(
    not interpreter_path().exists(), reason="desktop-env is not installed: deskrl evaluators install"
)

VARIABLES = {
    "aws": ["AWS_REGION", "AWS_SUBNET_ID", "AWS_SECURITY_GROUP_ID"],
    "azure": ["AZURE_SUBSCRIPTION_ID"],
    "aliyun": [
        *("ALIYUN_REGION", "ALIYUN_VSWITCH_ID", "ALIYUN_SECURITY_GROUP_ID", "ALIYUN_IMAGE_ID"),
        *("ALIYUN_ACCESS_KEY_ID", "ALIYUN_ACCESS_KEY_SECRET", "ALIYUN_INSTANCE_TYPE"),
    ],
    "volcengine": [
        *("VOLCENGINE_ACCESS_KEY_ID", "VOLCENGINE_SECRET_ACCESS_KEY", "VOLCENGINE_REGION", "VOLCENGINE_SUBNET_ID"),
        *("VOLCENGINE_SECURITY_GROUP_ID", "VOLCENGINE_INSTANCE_TYPE", "VOLCENGINE_IMAGE_ID", "VOLCENGINE_ZONE_ID"),
        "VOLCENGINE_DEFAULT_PASSWORD",
    ],
    "virtualbox": [],
}
OPTIONS: dict[str, dict[str, Any]] = {"aws": {"region": "us-east-1", "snapshot": "ami-1"}}


@pytest.mark.parametrize("provider", list(VARIABLES))
def test_a_desktop_starts_is_reset_and_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: str
) -> None:
    for name in VARIABLES[provider]:
        monkeypatch.setenv(name, "double")
    monkeypatch.setenv("ENABLE_TTL", "false")
    options = {"provider": provider, **OPTIONS.get(provider, {})}
    with Cloud(tmp_path, monkeypatch) as cloud:
        if provider == "azure":
            cloud.add_machine("a")
            options["machines"] = ["group/a"]
        elif provider == "virtualbox":
            options["machines"] = [cloud.add_machine("a")]
        config = DesktopConfig(
            provider="desktop_env", num_envs=1, width=1920, height=1080, start_timeout_s=300, provider_options=options
        )

        async def run() -> None:
            desktop = make_desktop(config, "d", cloud.run_root)
            try:
                await desktop.reset()
                assert (await desktop.screenshot()).size == (1, 1)
                await desktop.write_file("~/left", b"by an episode")
                await desktop.reset()
                assert await desktop.is_alive() and len(cloud.running()) == 1
                with pytest.raises(FileNotFoundError):
                    await desktop.read_file("~/left")
            finally:
                await desktop.close()

        asyncio.run(run())
        assert cloud.running() == [] and cloud.lock_files(provider) == []
