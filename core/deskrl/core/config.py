"""The run configuration: one TOML file describes a run, for every role.

Precedence: preset (`preset = "arpo"`) < TOML file < environment (`DESKRL_LEARNER__SEED=1`) < command line
(`--learner.seed 1`). Unknown keys are refused with their dotted path. Knows no role: a role reads its own section and
those of the services it calls. Imports no engine, so that `deskrl --help` and a refused key answer at once.
"""

from __future__ import annotations

import copy
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliApp,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from deskrl.core.errors import UserError
from deskrl.core.failure import FailureRule
from deskrl.core.presets import PRESETS, PresetName
from deskrl.core.runfolder import write_atomically

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveSeconds = Annotated[float, Field(gt=0)]
Device = Annotated[int, Field(ge=0)]


def refuse_no_address(value: str) -> str:
    """The value, if it is `host:port`; raises ValueError if not."""
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(f"{value} is no host:port such as 127.0.0.1:7411")
    return value


def _off_or_above_1(value: float) -> float:
    if value != 0 and value <= 1:
        raise ValueError(f"{value} is neither 0 (off) nor above 1")
    return value


Address = Annotated[str, AfterValidator(refuse_no_address)]
DualClip = Annotated[float, AfterValidator(_off_or_above_1)]


def _rehosted(address: str, host: str | None) -> str:
    """`host:port` at another host; None: as it is."""
    return address if host is None else f"{host}:{address.rpartition(':')[2]}"


class Section(BaseModel):
    """A table of the TOML file: frozen, strict about names, its attribute docstrings are the help texts."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelConfig(Section):
    """Which policy is trained."""

    path: Path | None = None
    """Folder of a model with its processor (Hugging Face layout). Unset: `build` makes one in the run folder."""
    build: Literal["tiny", "qwen_3b_shape", "ui_tars_7b_shape"] | None = None
    """Build a Qwen2.5-VL with random weights instead of loading one: `tiny` learns on a CPU, `ui_tars_7b_shape` has
    the size of UI-TARS-1.5-7B, `qwen_3b_shape` that of Qwen2.5-VL-3B, and show how fast a machine is."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.path is None) == (self.build is None):
            raise ValueError("set exactly one of model.path and model.build")
        return self


class TasksConfig(Section):
    """What is learnt."""

    suite: Path | None = None
    """Root of a task suite (`examples/<domain>/<id>.json` below it). Unset: deskrl's own suite for the desktops."""
    tasks: tuple[str, ...] = ()
    """Task ids to train on; empty: all tasks of the suite."""
    list: Path | None = None
    """Task list in OSWorld's format ({application: [id, ...]}) to train on, in place of a suite and its ids."""
    root: Path | None = None
    """Folder with the list's task files, `<application>/<id><suffix>.json`; unset: `examples/` beside the list."""
    suffix: str | None = None
    """What the file names add to the list's ids, as `_noise`; unset: found out."""
    unplayable: Literal["refuse", "skip", "play"] = "refuse"
    """What becomes of tasks that need what is known to be absent: the run is refused, they are left out, or they are
    played all the same (what is absent is then a fault)."""
    rollouts: Annotated[int, Field(ge=2)] = 8
    """Rollouts in a group. One rollout has no advantage, so two is the least."""
    max_steps: PositiveInt = 15
    """Turns of the policy before an episode ends with the termination step_limit."""

    @model_validator(mode="after")
    def _one_source(self) -> TasksConfig:
        if self.list is not None and (self.suite is not None or self.tasks):
            raise ValueError("set either tasks.list, or tasks.suite and tasks.tasks")
        if self.list is None and (self.root is not None or self.suffix is not None):
            raise ValueError("tasks.root and tasks.suffix say where the tasks of a tasks.list are, and there is none")
        return self


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


class DockerConfig(Section):
    """Desktops of the provider `docker`."""

    image: str = "deskrl-desktop"
    """Image of the desktop, as deploy/docker/build.sh makes it."""
    network: str = "bridge"
    """Docker network that the desktops are in; an internal one keeps them off the live web."""
    cpus: Annotated[float, Field(gt=0)] | None = None
    """Processors that one desktop may use; unset: all."""

    @field_validator("network")
    @classmethod
    def _publishes_ports(cls, value: str) -> str:
        if value in ("host", "none"):
            raise ValueError(f"{value}: in that network no desktop has ports of its own")
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


class DesktopConfig(Section):
    """The desktops."""

    provider: Literal["embedded", "docker", "osworld", "remote", "simulated"] = "embedded"
    """`embedded`: Xvfb and applications in an unprivileged sandbox on this machine; `docker`: the same in containers;
    `osworld`: OSWorld's virtual machine in containers; `remote`: guest servers that run already; `simulated`: no
    desktop, but the time one takes, a made-up screen and a reward by a rule (scale tests, machines without any)."""
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
    settle_quiet_s: Annotated[float, Field(ge=0)] = 0.08
    """The screen is settled when it has not changed for this long."""
    settle_limit_s: Annotated[float, Field(ge=0)] = 1.0
    """The longest that an action waits for a settled screen."""
    simulated: SimulatedConfig = SimulatedConfig()
    """The provider `simulated`."""
    docker: DockerConfig = DockerConfig()
    """For the provider `docker`."""
    osworld: OSWorldConfig = OSWorldConfig()
    """For the provider `osworld`."""
    remote: RemoteConfig = RemoteConfig()
    """For the provider `remote`."""


class AgentConfig(Section):
    """How the policy is prompted."""

    family: Literal["ui_tars_1_5"] = "ui_tars_1_5"
    """Prompt, action grammar and coordinates."""
    prompt: Literal["full", "brief"] = "full"
    """`full`: UI-TARS 1.5's; `brief`: the instruction and little else, for a policy that learns the grammar anew."""
    context: Literal["window", "episode"] = "window"
    """`window`: the last `window_images` screenshots; `episode`: all of them."""
    window_images: PositiveInt = 5
    """Screenshots kept in the context `window`."""
    image_width: PositiveInt | None = None
    """Width to which screenshots are scaled before the policy sees them; unset: as they are."""
    image_height: PositiveInt | None = None
    """Height to which screenshots are scaled before the policy sees them; unset: as they are."""
    format_error: Literal["fail", "evaluate"] = "fail"
    """What an action that cannot be parsed is worth, which always ends the episode: `fail`: 0, whatever was reached, so
    that format matters; `evaluate`: what the evaluator says of the state (`learner.grpo.format_penalty` comes off)."""
    language: str = "English"
    """Language of the thoughts, as the prompt asks for it."""


class ActorConfig(Section):
    """Actor processes."""

    desktops_per_actor: PositiveInt = 4
    """Desktops of one process; `num_envs` divided by this, rounded up, is the number of processes."""
    act_timeout_s: PositiveSeconds = 60.0
    """Deadline of one `Act`; a policy that cannot be reached for this long is a fault of the infrastructure."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Prometheus port of the first actor, counting up; 0: none."""


class ReplayConfig(Section):
    """The replay service."""

    address: Address = "127.0.0.1:7411"
    """Where others find it, and where it listens."""
    listen_host: str | None = None
    """Where it listens, if not at the host of `address`: 0.0.0.0 behind a load balancer or a name of a cluster."""
    schedule: Literal["free", "lock_step"] = "free"
    """`free`: every desktop goes on by itself; `lock_step`: all reset, act turn by turn and are evaluated together,
    each waiting for the slowest. With `learner.grpo.max_staleness = 0` the learner takes its turn too: ARPO's loop."""
    lease_ttl_s: PositiveSeconds = 30.0
    """A lease that is not extended for this long is granted again."""
    max_faults: Annotated[int, Field(ge=0)] = 3
    """How often a rollout that faulted is granted again."""
    max_bytes: PositiveInt = 20 * 1024**3
    """Size of the store above which consumed episodes are removed, oldest first."""
    successes_per_task: PositiveInt = 8
    """Successes kept for each task, first in first out."""
    success_above: float = 0.1
    """A reward above this is a success worth storing."""
    success_choice: Literal["uniform", "newest"] = "uniform"
    """Which stored success of its task a group that failed is offered."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Prometheus port; 0: none."""

    @property
    def listen_address(self) -> str:
        """Where it listens."""
        return _rehosted(self.address, self.listen_host)


class InferenceConfig(Section):
    """The inference server."""

    address: Address = "127.0.0.1:7421"
    """Where others find the gRPC service, and where it listens; replicas count the port up."""
    listen_host: str | None = None
    """Where it listens, if not at the host of `address`."""
    num_replicas: Annotated[int, Field(ge=0)] = 1
    """Data-parallel replicas that the launcher starts; 0: only those that join."""
    join: bool = False
    """This replica is none of those: it is found at its own `address`, which it announces at replay."""
    openai_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the OpenAI-compatible endpoint of the first replica, counting up; 0: none."""
    openai_host: str = "127.0.0.1"
    """Where that endpoint listens. It asks for no certificate, and whoever reaches it can use the model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Numeric type of weights and activations."""
    max_model_len: PositiveInt = 32768
    """Longest prompt and action together, in tokens."""
    max_images: PositiveInt = 15
    """Most screenshots in one prompt."""
    max_concurrent: PositiveInt = 256
    """Actions sampled at once."""
    gpu_memory_fraction: Fraction = 0.85
    """Share of GPU memory for the engine."""
    kv_cache_bytes: PositiveInt | None = None
    """Size of the KV cache; unset: what `gpu_memory_fraction` leaves (on a CPU, set it)."""
    max_action_tokens: PositiveInt = 512
    """Longest action in tokens."""
    image_cache_bytes: PositiveInt = 1024**3
    """Screenshots kept by hash, as bytes of pixels (2.8 MB for 1280 x 720): in this process, and beside the model."""
    weight_transfer: Literal["auto", "stream", "ipc", "nccl"] = "auto"
    """How new weights come: `stream` over gRPC; `nccl` from the learner's GPU to another; `ipc` on the GPU that both
    share; `auto`: the fastest that learner and replica have between them."""
    devices: tuple[Device, ...] = ()
    """GPUs of the replicas, by number: each replica takes as many as it has workers. Empty: what the environment says
    (`CUDA_VISIBLE_DEVICES`)."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further vLLM engine arguments, as vLLM names them."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Prometheus port of the first replica, counting up; 0: none."""

    @property
    def num_workers(self) -> int:
        """Workers of one replica, and so the GPUs that it takes."""
        return int(self.engine_args.get("tensor_parallel_size", 1))

    @property
    def replica_addresses(self) -> list[str]:
        """Where the replicas are found."""
        return [self.replica_address(index) for index in range(self.num_replicas)]

    def replica_address(self, index: int) -> str:
        """Where replica number `index` is found: the first at `address`, the others counting its port up."""
        host, _, port = self.address.rpartition(":")
        return f"{host}:{int(port) + index}"

    def listen_address(self, index: int) -> str:
        """Where replica number `index` listens."""
        return _rehosted(self.replica_address(index), self.listen_host)


class WarmStartConfig(Section):
    """Imitation of scripted solutions before GRPO."""

    demos_per_task: PositiveInt = 16
    """Demonstrations recorded for each task."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """AdamW learning rate of the imitation phase."""
    batch_episodes: PositiveInt = 8
    """Demonstrations in one optimizer step."""
    max_updates: PositiveInt = 400
    """Optimizer steps at most."""
    stop_likelihood: Fraction = 0.3
    """A task is imitated until the policy, sampled as in training, repeats its demonstrations with this probability."""


class GrpoConfig(Section):
    """The reinforcement-learning phase; the defaults are the preset `deskrl`, corrected and asynchronous ARPO.

    Every difference to ARPO as published is one key here or in `agent`; `presets.py` has its values.
    """

    num_updates: Annotated[int, Field(ge=0)] = 100
    """Optimizer updates in all."""
    groups_per_batch: PositiveInt = 4
    """Groups with spread that make a batch."""
    max_staleness: Annotated[int, Field(ge=0)] = 4
    """Versions between the oldest token's policy and the one that learns from it."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """AdamW learning rate."""
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    """Update n of these (n from 0) learns at n / warmup_updates of the learning rate, the first one at 0; then it is
    constant. 0: constant from the start."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    clip_low: Fraction = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: Annotated[float, Field(ge=0)] = 0.3
    """The ratio is clipped above 1 + clip_high."""
    dual_clip: DualClip = 0.0
    """Largest ratio with which a token of negative advantage is pushed down; above 1, or 0: none."""
    importance: Literal["truncated", "off"] = "truncated"
    """`truncated`: tokens weigh by pi_prox / pi_behaviour up to `importance_cap`; `off`: as if the policy that the
    update starts from had sampled them."""
    importance_cap: Annotated[float, Field(gt=0)] = 2.0
    """Truncation of the weight pi_prox / pi_behaviour."""
    advantage: Literal["centred", "standardised"] = "centred"
    """`centred`: reward minus the group's mean; `standardised`: that by the group's sample standard deviation."""
    format_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Taken from the reward of an episode that ended with an action that cannot be parsed. Neither success rates nor
    the replay of successes see it."""
    groups_without_spread: Literal["drop", "keep"] = "drop"
    """`drop`: other work takes their place in the batch; `keep`: they fill it with advantage 0."""
    negative_scale: Annotated[float, Field(ge=0)] = 1.0
    """Multiplies negative advantages; below 1 it keeps a small policy from collapsing."""
    minibatches: PositiveInt = 1
    """Optimizer steps in which a batch is learnt."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature of rollouts, applied by the learner too."""
    loss_denominator: Literal["constant", "trajectory_tokens"] = "constant"
    """By what a token's loss is divided, besides the number of trajectories: `constant`: `loss_scale_tokens`;
    `trajectory_tokens`: the tokens of its own trajectory, so the loss is the mean of the trajectories' means."""
    loss_scale_tokens: PositiveInt = 64
    """The constant denominator of the loss: tokens of a typical episode."""
    replay_successes: bool = True
    """When a group fails, one stored success of the task takes the place of one member. Off: none is stored either."""
    replay_when: FailureRule = "all_failed"
    """`all_failed`: no reward is above `replay.success_above`; `low_and_alike`: their mean is below 0.2 and their
    population standard deviation below 0.05."""
    replay_place: Literal["first", "random", "oldest"] = "first"
    """Whose place a stored success takes: the first member's, one's at random, or that which was acted longest ago."""
    success_ratio: Literal["one", "truncated"] = "one"
    """How a stored success is weighted: from ratio 1, or by its truncated importance weight."""
    dynamic_rollouts: bool = False
    """Fewer rollouts for tasks that are solved often: 9 / rate - 7 of them, two at the least, from a rate of 0.6 on
    when they were last played."""
    shuffle_rewards: bool = False
    """Control experiment: deal each group's rewards out at random; what still rises is not learnt from them."""


class EvalConfig(Section):
    """Evaluation before and after."""

    episodes: Annotated[int, Field(ge=0)] = 0
    """Fresh sampled episodes before and after the GRPO phase; 0: none."""


class LearnerConfig(Section):
    """The learner."""

    num_processes: PositiveInt = 1
    """Ranks of the torchrun world."""
    master_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Rendezvous port of the ranks; 0: a free one."""
    devices: tuple[Device, ...] = ()
    """GPUs of the ranks, by number, one each. Empty: what the environment says (`CUDA_VISIBLE_DEVICES`)."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage. 1 adds gradients up in `dtype`, whole on each rank; 2 and 3 in float32, parted."""
    offload_optimizer: bool = False
    """Keep master weights and optimizer states in the host's memory; needs a ZeRO stage above 0."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Numeric type of forward and backward."""
    micro_batch_tokens: PositiveInt = 16384
    """Tokens of one forward pass, screenshots counted; a longer row goes alone."""
    activations: Literal["all", "attention", "layers"] = "all"
    """What is kept for the backward pass: everything; layers' inputs and attention's results; layers' inputs only. What
    is not kept is computed anew."""
    freeze_vision: bool = False
    """Leave the vision tower as it is; a screenshot then goes through it once, as long as its features are kept."""
    feature_cache_bytes: Annotated[int, Field(ge=0)] = 8 * 1024**3
    """Features of screenshots kept in the host's memory while the vision tower is frozen (under ZeRO 3, none are)."""
    checkpoint_every: PositiveInt = 1
    """Updates between checkpoints; a batch is consumed when the checkpoint that learnt from it is committed."""
    keep_checkpoints: PositiveInt = 3
    """Checkpoints kept, newest first."""
    keep_scores: Annotated[int, Field(ge=0)] = 100
    """Updates of which each token's logprob and entropy are kept for `deskrl view`, newest first."""
    warm_start: WarmStartConfig | None = None
    """Imitation phase; unset: none."""
    grpo: GrpoConfig = GrpoConfig()
    """The reinforcement-learning phase."""
    eval: EvalConfig = EvalConfig()
    """Evaluation before and after."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Prometheus port; 0: none."""

    @model_validator(mode="after")
    def _something_to_offload(self) -> LearnerConfig:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        return self


class SecurityConfig(Section):
    """Who may take part."""

    folder: Path | None = None
    """What `deskrl certificates` made: every channel is then encrypted, and both ends prove their role. Unset: loopback
    addresses only."""
    metrics_host: str = "127.0.0.1"
    """Where Prometheus ports listen. They ask for no certificate: choose a network that only monitoring reaches."""

    @field_validator("folder")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()


class RunConfig(BaseSettings):
    """A whole run."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        env_prefix="DESKRL_",
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
        cli_exit_on_error=False,  # an unknown option is one line too, not a page of usage
    )

    preset: PresetName = "deskrl"
    """Where values come from that the run does not state: `deskrl`, the defaults told here, or `arpo`, ARPO's own."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run: its folder is `<runs>/<name>`."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Everything random starts from here."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Also write wandb logs (needs the extra `wandb`)."""
    # A factory, because partial updates merge a file's keys with those of a default instance: path beside build.
    model: ModelConfig = Field(default_factory=lambda: ModelConfig(build="tiny"))
    tasks: TasksConfig = TasksConfig()
    desktop: DesktopConfig = DesktopConfig()
    agent: AgentConfig = AgentConfig()
    actor: ActorConfig = ActorConfig()
    replay: ReplayConfig = ReplayConfig()
    inference: InferenceConfig = InferenceConfig()
    learner: LearnerConfig = LearnerConfig()
    security: SecurityConfig = SecurityConfig()

    @field_validator("runs")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.runs / self.name

    @property
    def num_actors(self) -> int:
        """Actor processes, as they follow from the number of desktops."""
        return -(-self.desktop.num_envs // self.actor.desktops_per_actor)

    @property
    def model_folder(self) -> Path:
        """Where the initial model lies."""
        return self.model.path if self.model.path is not None else self.folder / "model"

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) of screenshots as the policy sees them."""
        return self.agent.image_width or self.desktop.width, self.agent.image_height or self.desktop.height


class _PresetSource(PydanticBaseSettingsSource):
    """The preset that the sources before this one have named."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Nothing field by field: values come all at once."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        """The preset's values; of a name that is none nothing, and the schema refuses it."""
        name = self.current_state.get("preset", "deskrl")
        return copy.deepcopy(dict(PRESETS[name])) if name in PRESETS else {}


def load_config(path: Path, arguments: Sequence[str] = ()) -> RunConfig:
    """Read a run configuration.

    Args:
        path: TOML file.
        arguments: overrides as they stand on the command line: `["--learner.grpo.num_updates", "3"]`.

    Raises:
        UserError: the file cannot be read, is no TOML, or holds unknown or contradictory keys.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file", "name a run configuration, such as deploy/runs/smoke.toml")
    return _load(lambda schema: TomlConfigSettingsSource(schema, toml_file=path), str(path), arguments)


def load_values(values: Mapping[str, Any], origin: str, arguments: Sequence[str] = ()) -> RunConfig:
    """A run configuration from nested values in place of a file; environment and command line win as they do there.

    Args:
        values: as a TOML file would hold them.
        origin: where they come from, for refusals.
        arguments: overrides as they stand on the command line.
    """
    return _load(lambda schema: InitSettingsSource(schema, dict(values)), origin, arguments)


def overridden_keys(arguments: Sequence[str]) -> set[str]:
    """Dotted keys that environment or command line set."""
    options = {argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")}
    prefix, delimiter = "DESKRL_", "__"
    variables = {name.removeprefix(prefix).lower() for name in os.environ if name.startswith(prefix)}
    return options | {name.replace(delimiter, ".") for name in variables}


def _load(
    source_of: Callable[[type[BaseSettings]], PydanticBaseSettingsSource], origin: str, arguments: Sequence[str]
) -> RunConfig:
    class BoundRunConfig(RunConfig):
        """The same schema, bound to a source of its own."""

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, source_of(settings_cls), _PresetSource(settings_cls)

    try:
        return CliApp.run(BoundRunConfig, cli_args=list(arguments))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{origin}: not readable as TOML: {error}", "mend the file") from error
    except ValidationError as error:
        raise UserError(f"{origin}: {_describe(error)}", "mend the key, or remove it") from error
    except SettingsError as error:  # of the command line or the environment, and it says which
        raise UserError(_describe(error), "mend the key, or remove it") from error


def dump_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as JSON; `read_resolved` reads it back."""
    write_atomically(path, (config.model_dump_json(indent=2) + "\n").encode())


def read_resolved(path: Path) -> RunConfig:
    """Read what `dump_config` wrote: exactly that, whatever the environment says."""
    try:
        return RunConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file", "name the folder of a run that was started") from error
    except (OSError, ValidationError) as error:
        raise UserError(f"{path}: {_describe(error)}", "start the run anew: its configuration is damaged") from error


def _describe(error: Exception) -> str:
    """All of a refusal in one line: dotted key and reason, several parted by semicolons."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    parts = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            parts.append(f"unknown key {key}")
        else:
            reason = item["msg"].removeprefix("Value error, ")
            parts.append(f"{key}: {reason}" if key else reason)
    return "; ".join(parts)
