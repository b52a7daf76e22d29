"""Effect of options of desktop providers: CPUs and memory of containers, and the spread of simulated durations."""

import json
import math
import statistics
from pathlib import Path
from random import Random

import pytest

from deskrl.actor.desktops import docker
from deskrl.actor.desktops.osworld import container_options
from deskrl.actor.desktops.simulated import Latencies
from deskrl.core.config import DesktopConfig, DockerConfig, OSWorldConfig, SimulatedConfig


@pytest.mark.parametrize(("cpus", "nano_cpus"), [(None, None), (1.5, 1_500_000_000)])
def test_the_number_of_cpus_of_a_docker_desktop_can_be_limited(cpus: float | None, nano_cpus: int | None) -> None:
    config = DesktopConfig(provider="docker", docker=DockerConfig(cpus=cpus))
    assert docker.container_options(config, 1000, Path("/x/handoff.sock"))["nano_cpus"] == nano_cpus


def test_a_docker_desktop_gets_a_root_with_few_capabilities_and_programs_of_another_user() -> None:
    config = DesktopConfig(provider="docker", max_processes=100)
    options = docker.container_options(config, 60800, Path("/x/handoff.sock"))
    assert (options["user"], options["cap_drop"], options["security_opt"]) == ("0:0", ["ALL"], ["no-new-privileges"])
    assert set(options["cap_add"]) == {"SETUID", "SETGID", "KILL"}
    guest = json.loads(options["command"][0])
    assert (guest["session_user_id"], guest["max_processes"]) == (60800, 100)
    assert options["pids_limit"] > 100, "the guest server has a reserve"
    assert "uid=60800" in options["tmpfs"]["/home/user"] and "uid" not in options["tmpfs"]["/run"]
    mounts = {mount["Target"]: mount for mount in options["mounts"]}
    assert set(mounts) == {"/run/handoff.sock", "/etc/passwd", "/etc/group"}
    assert all(mount["ReadOnly"] for mount in mounts.values())


def test_cpus_and_memory_of_osworlds_virtual_machine_can_be_set() -> None:
    environment = container_options(OSWorldConfig(cpus=2, ram_bytes=3 * 1024**3 + 1))["environment"]
    assert (environment["CPU_CORES"], environment["RAM_SIZE"]) == ("2", "3072M")


@pytest.mark.parametrize("sigma", [0.0, 0.2, 0.8])
def test_simulated_durations_have_the_configured_spread(sigma: float) -> None:
    latencies = Latencies(SimulatedConfig(reset_sigma=sigma, action_sigma=sigma, hang_rate=0.0), Random(3))
    for draw in (latencies.reset_s, latencies.action_s):
        logarithms = [math.log(draw()) for _ in range(4000)]
        assert statistics.pstdev(logarithms) == pytest.approx(sigma, rel=0.05, abs=1e-9)
