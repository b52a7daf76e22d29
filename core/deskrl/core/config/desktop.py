"""Section `desktop`: the desktops of a run, and the settings of each provider."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from deskrl.core.config.value_types import (
    Address,
    Fraction,
    NonNegativeSeconds,
    Pixels,
    PositiveBytes,
    PositiveFactor,
    PositiveInt,
    PositiveSeconds,
    Section,
    Sigma,
)


class SimulatedConfig(Section):
    """Durations and rewards of the provider `simulated`. Durations are in simulated seconds (see `time_scale`)."""

    time_scale: PositiveFactor = 1.0
    """Real seconds per simulated second, for example 0.02 for desktops that are 50 times faster. Timeouts are in real
    seconds."""
    reset_median_s: PositiveSeconds = 45.0
    """Median duration of a reset; durations are lognormal."""
    reset_sigma: Sigma = 0.35
    """Standard deviation of the logarithm of a reset's duration."""
    action_median_s: PositiveSeconds = 3.0
    """Median duration of an action including the screenshot after it; durations are lognormal."""
    action_sigma: Sigma = 0.5
    """Standard deviation of the logarithm of an action's duration."""
    hang_rate: Fraction = 0.005
    """Fraction of actions that hang."""
    hang_s: PositiveSeconds = 60.0
    """Duration of an action that hangs. Above `desktop.step_timeout_s`, the desktop is replaced."""
    evaluation_min_s: NonNegativeSeconds = 5.0
    """Shortest duration of an evaluation; durations are uniformly distributed."""
    evaluation_max_s: PositiveSeconds = 25.0
    """Longest duration of an evaluation."""
    random_success_rate: Fraction = 0.0
    """Fraction of episodes that get reward 1 whatever the policy did."""


class EmbeddedConfig(Section):
    """Artificial delays of the provider `embedded`, for experiments on scheduling with slower desktops.

    Delays are lognormal and drawn for each desktop independently. A median of 0 adds no delay.
    """

    added_reset_median_s: NonNegativeSeconds = 0.0
    """Median delay added to each reset; 0 adds none."""
    added_reset_sigma: Sigma = 0.35
    """Standard deviation of the logarithm of the delay added to a reset."""
    added_action_median_s: NonNegativeSeconds = 0.0
    """Median delay added between each action and its screenshot; 0 adds none."""
    added_action_sigma: Sigma = 0.5
    """Standard deviation of the logarithm of the delay added to an action."""

    @property
    def has_added_delay(self) -> bool:
        """Whether any delay is added."""
        return self.added_reset_median_s > 0 or self.added_action_median_s > 0

    def describe_delay(self) -> str:
        """Return a description of the added delays."""
        return (
            f"median {self.added_reset_median_s:g} s per reset (sigma {self.added_reset_sigma:g}), "
            f"{self.added_action_median_s:g} s per action (sigma {self.added_action_sigma:g})"
        )


class DockerConfig(Section):
    """Settings of the provider `docker`."""

    image: str = "deskrl-desktop"
    """Docker image of the desktop, as built by deploy/docker/build.sh."""
    network: str = "none"
    """Docker network of the desktops. On any network other than `none`, desktops can reach this machine's ports, each
    other, and whatever that network reaches, including a cloud's metadata address. `host` is rejected."""
    cpus: Annotated[float, Field(gt=0, le=4096)] | None = None
    """Number of CPUs that one desktop may use, as in `docker run --cpus`; unset: no limit."""

    @field_validator("network")
    @classmethod
    def _check_not_host(cls, value: str) -> str:
        if value == "host":
            raise ValueError("must not be host: desktops would share this machine's network, including its loopback")
        return value


class RemoteConfig(Section):
    """Settings of the provider `remote`."""

    addresses: tuple[Address, ...] = ()
    """Addresses (host:port) of guest servers that implement OSWorld's protocol; each is one desktop."""
    reset_command: str = ""
    """Shell command, run on this machine, that restores a guest to its initial state; {host} and {port} are replaced.
    Unset: a reset only closes the windows, and files written by an episode remain for the next one."""


class OSWorldConfig(Section):
    """Settings of the provider `osworld`: OSWorld's official virtual machine in a Docker container."""

    image: str = "happysixd/osworld-docker"
    """Docker image that runs the virtual machine."""
    disk: Path | None = None
    """Disk image of the virtual machine (Ubuntu.qcow2); required by this provider."""
    kvm: Literal["auto", "require", "off"] = "auto"
    """Hardware virtualisation. `auto`: used if /dev/kvm is available; `require`: the run is rejected without it; `off`:
    not used, which is many times slower."""
    cpus: Annotated[int, Field(ge=1, le=4096)] = 4
    """Number of virtual CPUs of one virtual machine."""
    ram_bytes: PositiveBytes = 4 * 1024**3
    """Memory of one virtual machine, in bytes; rounded down to whole MiB."""
    pause_when_idle: bool = True
    """Pause a virtual machine between episodes, so that it uses no CPU time and does not lock its screen."""


class VMwareConfig(Section):
    """Settings of the provider `vmware`: virtual machines of VMware Workstation or Fusion on this machine."""

    machines: tuple[Path, ...] = ()
    """Virtual machines (.vmx files) that run OSWorld's guest server; each is one desktop."""
    snapshot: Annotated[str, Field(min_length=1)] = "init_state"
    """Name of the snapshot that a reset restores."""
    vmrun: str = "vmrun"
    """VMware's command-line program `vmrun`: a name on the PATH, or a path."""
    product: Literal["ws", "fusion"] | None = None
    """VMware product, as in `vmrun -T`: `ws` (Workstation) or `fusion` (Fusion); unset: Fusion on macOS, otherwise
    Workstation."""


class DesktopConfig(Section):
    """Desktops of the run."""

    provider: str = "embedded"
    """Where desktops run. `embedded`: Xvfb and applications in an unprivileged sandbox on this machine; `docker`: the
    same in Docker containers; `osworld`: OSWorld's virtual machine in Docker containers; `vmware`: VMware virtual
    machines on this machine; `desktop_env`: virtual machines of a cloud or of VirtualBox, by the providers of OSWorld's
    package desktop-env; `remote`: existing guest servers; `gymnasium` and `openenv`: environments of Gymnasium, or of
    an OpenEnv server, instead of a desktop; `simulated`: no real desktop, but realistic durations, synthetic
    screenshots and a rule-based reward, for scale tests. Or a provider of your own: its name, or
    `package.module:Class`."""
    provider_options: dict[str, Any] = Field(default_factory=dict)
    """Configuration of the providers `desktop_env`, `gymnasium` and `openenv`, or of a provider of your own, which
    documents its keys. The other providers of deskrl have sections instead, such as `desktop.docker`."""
    num_envs: Annotated[int, Field(ge=1, le=1_000_000)] = 4
    """Number of desktops in the whole run. The number of actor processes follows from it and
    `actor.desktops_per_actor`."""
    width: Pixels = 1280
    """Screen width in pixels."""
    height: Pixels = 720
    """Screen height in pixels."""
    memory_bytes: PositiveBytes = 2 * 1024**3
    """Memory limit of one desktop in bytes, enforced where the provider and the machine support it."""
    max_processes: PositiveInt = 256
    """Limit on the number of processes of one desktop, enforced where the provider and the machine support it."""
    max_file_bytes: PositiveBytes = 64 * 1024**2
    """Size limit of a file that is read from a desktop, in bytes; a larger file counts as missing."""
    start_timeout_s: PositiveSeconds = 60.0
    """Timeout from the start of a desktop to its first screenshot."""
    start_retry_timeout_s: PositiveSeconds = 300.0
    """Time after which an actor ends if none of its desktops starts. A desktop that does not start is set aside and
    retried with growing pauses of at most a minute, while the actor's other desktops continue."""
    setup_timeout_s: PositiveSeconds = 60.0
    """Timeout of a task's setup; exceeding it is a fault of the rollout."""
    window_timeout_s: NonNegativeSeconds = 30.0
    """Longest time that a setup waits until the applications that it started show windows that are complete: no splash
    screen, more than one colour, and no change. It is a part of the setup's time. 0: no wait."""
    step_timeout_s: PositiveSeconds = 30.0
    """Timeout of an action including its screenshot; a desktop that exceeds it is considered hung and is replaced."""
    evaluate_timeout_s: PositiveSeconds = 60.0
    """Timeout of an evaluation. Exceeding it is a fault of the rollout before the policy's first action, and a failure
    of the policy (termination `state_unreadable`) after it."""
    settle_quiet_s: NonNegativeSeconds = 0.04
    """Time without a change after which the screen counts as settled, so that the screenshot is taken."""
    settle_timeout_s: NonNegativeSeconds = 1.0
    """Longest time that an action waits for a settled screen before the screenshot is taken anyway."""
    embedded: EmbeddedConfig = EmbeddedConfig()
    """Settings of the provider `embedded`."""
    simulated: SimulatedConfig = SimulatedConfig()
    """Settings of the provider `simulated`."""
    docker: DockerConfig = DockerConfig()
    """Settings of the provider `docker`."""
    osworld: OSWorldConfig = OSWorldConfig()
    """Settings of the provider `osworld`."""
    vmware: VMwareConfig = VMwareConfig()
    """Settings of the provider `vmware`."""
    remote: RemoteConfig = RemoteConfig()
    """Settings of the provider `remote`."""
