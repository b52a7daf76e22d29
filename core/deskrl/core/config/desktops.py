"""The desktops: section `desktop`, and what belongs to one provider alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from deskrl.core.config.values import Address, Fraction, PositiveInt, PositiveSeconds, Section


class SimulatedConfig(Section):
    """The time that simulated desktops take, and their reward. Seconds here are the desktop's, before `time_scale`."""

    time_scale: Annotated[float, Field(gt=0)] = 1.0
    """A simulated second passes in so many real ones; deadlines are real."""
    reset_median_s: PositiveSeconds = 45.0
    """A reset: lognormal with this median."""
    reset_sigma: Annotated[float, Field(ge=0)] = 0.35
    """Standard deviation of the logarithm of a reset's time."""
    action_median_s: PositiveSeconds = 3.0
    """An action with the screenshot after it: lognormal with this median."""
    action_sigma: Annotated[float, Field(ge=0)] = 0.5
    """Standard deviation of the logarithm of an action's time."""
    hang_share: Fraction = 0.005
    """Share of actions that hang."""
    hang_s: PositiveSeconds = 60.0
    """How long a hanging action takes; over `desktop.step_timeout_s` the desktop is given up for it."""
    evaluation_min_s: Annotated[float, Field(ge=0)] = 5.0
    """An evaluation: uniform from here"""
    evaluation_max_s: PositiveSeconds = 25.0
    """to here."""
    luck: Fraction = 0.0
    """Share of episodes that are rewarded whatever was done."""


class EmbeddedConfig(Section):
    """Time that embedded desktops are made to take beyond what they do, so that they are as slow as others are.

    For experiments on scheduling. Each desktop draws its own, lognormal; a median of 0 adds nothing.
    """

    added_reset_median_s: Annotated[float, Field(ge=0)] = 0.0
    """Median of what a reset takes longer."""
    added_reset_sigma: Annotated[float, Field(ge=0)] = 0.35
    """Standard deviation of the logarithm of that."""
    added_action_median_s: Annotated[float, Field(ge=0)] = 0.0
    """Median of what an action takes longer until its screenshot is asked for."""
    added_action_sigma: Annotated[float, Field(ge=0)] = 0.5
    """Standard deviation of the logarithm of that."""

    @property
    def adds_time(self) -> bool:
        """Whether anything is added."""
        return self.added_reset_median_s > 0 or self.added_action_median_s > 0

    def describe(self) -> str:
        """What is added, in words."""
        return (
            f"median {self.added_reset_median_s:g} s a reset (sigma {self.added_reset_sigma:g}), "
            f"{self.added_action_median_s:g} s an action (sigma {self.added_action_sigma:g})"
        )


class DockerConfig(Section):
    """Desktops of the provider `docker`."""

    image: str = "deskrl-desktop"
    """Image of the desktop, as deploy/docker/build.sh makes it."""
    network: str = "none"
    """Docker network that the desktops are in. In any but `none` they reach this machine's ports, one another and
    whatever that network reaches, a cloud's metadata address among it."""
    cpus: Annotated[float, Field(gt=0)] | None = None
    """Processors that one desktop may use; unset: all."""

    @field_validator("network")
    @classmethod
    def _is_not_this_machines(cls, value: str) -> str:
        if value == "host":
            raise ValueError("host: that is this machine's own network, its loopback with it")
        return value


class RemoteConfig(Section):
    """Desktops of the provider `remote`."""

    addresses: tuple[Address, ...] = ()
    """Guest servers, host:port, that speak OSWorld's protocol; one desktop each."""
    reset_command: str = ""
    """Shell command of this machine that brings a guest back to its first state; {host} and {port} are replaced. Unset:
    a reset only closes the windows, and files that an episode leaves stay for the next."""


class OSWorldConfig(Section):
    """Desktops of the provider `osworld`: the official virtual machine in a container."""

    image: str = "happysixd/osworld-docker"
    """Image that runs the virtual machine."""
    disk: Path | None = None
    """The virtual machine's disk (Ubuntu.qcow2)."""
    kvm: Literal["auto", "require", "off"] = "auto"
    """Hardware virtualisation: where /dev/kvm is, or not without it, or not at all (many times slower)."""
    cpus: PositiveInt = 4
    """Processors of one virtual machine."""
    ram_bytes: PositiveInt = 4 * 1024**3
    """Memory of one virtual machine."""
    pause: bool = True
    """Pause a virtual machine while nothing is asked of it: it takes no processor time and does not lock its screen."""


class VMwareConfig(Section):
    """Desktops of the provider `vmware`: virtual machines of VMware Workstation or Fusion on this machine."""

    machines: tuple[Path, ...] = ()
    """Virtual machines (.vmx files) with OSWorld's guest in them, one desktop each."""
    snapshot: Annotated[str, Field(min_length=1)] = "init_state"
    """What a reset goes back to."""
    vmrun: str = "vmrun"
    """VMware's program that drives them: its name on the PATH, or its place."""
    product: Literal["ws", "fusion"] | None = None
    """`ws`: Workstation, `fusion`: Fusion; unset: Fusion on a Mac, else Workstation."""


class DesktopConfig(Section):
    """The desktops."""

    provider: Literal["embedded", "docker", "osworld", "vmware", "remote", "simulated"] = "embedded"
    """`embedded`: Xvfb and applications in an unprivileged sandbox on this machine; `docker`: the same in containers;
    `osworld`: OSWorld's virtual machine in containers; `vmware`: virtual machines of VMware on this machine; `remote`:
    guest servers that run already; `simulated`: no desktop, but the time one takes, a made-up screen and a reward by a
    rule (scale tests, machines without any)."""
    num_envs: PositiveInt = 4
    """Desktops in the whole run: the knob from which the number of actor processes follows."""
    width: PositiveInt = 1280
    """Screen width in pixels."""
    height: PositiveInt = 720
    """Screen height in pixels."""
    memory_bytes: PositiveInt = 2 * 1024**3
    """Memory limit of one desktop, where the machine allows one."""
    max_processes: PositiveInt = 256
    """Process limit of one desktop, where the machine allows one."""
    start_timeout_s: PositiveSeconds = 60.0
    """From nothing to the first screenshot."""
    setup_timeout_s: PositiveSeconds = 60.0
    """A task's setup; longer is a fault."""
    step_timeout_s: PositiveSeconds = 30.0
    """An action with its settled screenshot; longer and the desktop is taken for hung, and replaced."""
    evaluate_timeout_s: PositiveSeconds = 60.0
    """An evaluator; longer is a fault."""
    settle_quiet_s: Annotated[float, Field(ge=0)] = 0.04
    """The screen is settled when it has not changed for this long."""
    settle_limit_s: Annotated[float, Field(ge=0)] = 1.0
    """The longest that an action waits for a settled screen."""
    embedded: EmbeddedConfig = EmbeddedConfig()
    """For the provider `embedded`."""
    simulated: SimulatedConfig = SimulatedConfig()
    """The provider `simulated`."""
    docker: DockerConfig = DockerConfig()
    """For the provider `docker`."""
    osworld: OSWorldConfig = OSWorldConfig()
    """For the provider `osworld`."""
    vmware: VMwareConfig = VMwareConfig()
    """For the provider `vmware`."""
    remote: RemoteConfig = RemoteConfig()
    """For the provider `remote`."""
