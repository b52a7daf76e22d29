"""Sections `replay`, `inference` and `security`: the services of a run, and how roles authenticate to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from deskrl.core.addresses import HostPort
from deskrl.core.config.engine_arg_checks import check_engine_args
from deskrl.core.config.external_parameters import check_external_parameters
from deskrl.core.config.value_types import (
    Address,
    Device,
    Fraction,
    Host,
    HttpUrl,
    NonNegativeInt,
    Port,
    PositiveBytes,
    PositiveInt,
    PositiveSeconds,
    Section,
)


def _with_host(address: HostPort, host: str | None) -> HostPort:
    """Return an address with another host; None keeps the address."""
    return address if host is None else HostPort.of(host, address.port)


class ReplayConfig(Section):
    """The replay service."""

    address: Address = HostPort("127.0.0.1:7411")
    """Address (host:port) at which other roles reach the replay service; it listens there unless `listen_host` is
    set. Unset: `deskrl up` and `deskrl eval` choose a free port."""
    listen_host: Host | None = None
    """Host on which the service listens, such as 0.0.0.0 behind a load balancer or a cluster's service name; unset: the
    host of `address`."""
    schedule: Literal["asynchronous", "lock_step"] = "asynchronous"
    """Scheduling of desktops. `asynchronous`: each desktop proceeds independently; `lock_step`: all desktops reset,
    take each step and are evaluated together, waiting for the slowest. With `learner.grpo.max_staleness = 0`, updates
    alternate with sampling too, as in ARPO."""
    lease_ttl_s: PositiveSeconds = 30.0
    """Time after which a lease that was not extended expires, so that its rollout is leased again."""
    max_faults: NonNegativeInt = 3
    """Number of times that a rollout is leased again after a fault."""
    max_bytes: PositiveBytes = 20 * 1024**3
    """Size of the episode store above which consumed episodes are evicted, oldest first."""
    folder: Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())] | None = None
    """Folder for the episode stores of runs, on a local disk of the machine on which replay runs: network file systems
    are rejected. The run directory then has a link `replay` to the store. Unset: it is in the run directory."""
    successes_per_task: PositiveInt = 8
    """Capacity of the success buffer per task; the oldest success is evicted first."""
    success_threshold: Annotated[float, Field(ge=-1e6, le=1e6)] = 0.1
    """An episode with a reward above this is a success."""
    success_sampling: Literal["uniform", "newest"] = "uniform"
    """Which stored success of its task a failed group gets: a random one, or the newest."""
    metrics_port: Port = 0
    """Port of the Prometheus metrics; 0 disables them. Unset: `deskrl up` and `deskrl eval` choose a free port."""

    @property
    def listen_address(self) -> HostPort:
        """Address on which the service listens."""
        return _with_host(self.address, self.listen_host)


class InferenceConfig(Section):
    """Inference replicas."""

    address: Address = HostPort("127.0.0.1:7421")
    """Address (host:port) at which other roles reach the first replica; further replicas use the following ports.
    Unset: `deskrl up` and `deskrl eval` choose free ports."""
    listen_host: Host | None = None
    """Host on which replicas listen; unset: the host of `address`."""
    num_replicas: Annotated[int, Field(ge=0, le=4096)] = 1
    """Number of data-parallel replicas that the launcher starts; 0: only replicas that join."""
    external_url: HttpUrl | None = None
    """Base URL of a server (http://host:9000/v1) used instead of replicas. It accepts no weights and returns neither
    token ids nor logprobs nor policy versions, so it can only be used for evaluation."""
    external_model: str | None = None
    """Name of the model on the server at `external_url`."""
    external_api: Literal["chat_completions", "anthropic_messages", "openai_responses"] = "chat_completions"
    """Protocol of the server at `external_url`. `chat_completions`: any OpenAI-compatible server, with any action
    language; `anthropic_messages`: Anthropic's Messages API, with the action language `anthropic_computer_use`;
    `openai_responses`: OpenAI's Responses API, with the action language `openai_computer_use`."""
    external_api_key_variable: Annotated[str, Field(min_length=1)] | None = None
    """Environment variable with the API key of the server at `external_url`; unset: OPENAI_API_KEY, or
    ANTHROPIC_API_KEY for `anthropic_messages`. The key itself is not stored."""
    external_parameters: Annotated[dict[str, Any], AfterValidator(check_external_parameters)] = Field(
        default_factory=dict
    )
    """Further fields of each request to the server at `external_url`, under the names of its API, such as
    `{ reasoning = { effort = "low" } }`. The two APIs with tools get no sampling temperature unless it is given
    here."""
    join: bool = False
    """This replica joins a run in addition to `num_replicas`: it listens at its own `address` and registers it with the
    replay service."""
    openai_port: Port = 0
    """Port of the OpenAI-compatible endpoint of the first replica; further replicas use the following ports. 0 disables
    it."""
    openai_host: Host = "127.0.0.1"
    """Host on which the OpenAI-compatible endpoint listens. The endpoint is unauthenticated: anyone who can
    reach it can use the model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Numeric type of weights and activations; GPUs older than Ampere (T4, V100) do not support bfloat16."""
    quantization: Literal["int4"] | None = None
    """Weight quantization. `int4`: the matrices of the language model are served with 4 bits from a copy in the run
    directory, an eighth of the size of float32. The served policy then differs from the trained one, so use it for
    evaluation only. Unset: no quantization."""
    max_model_len: PositiveInt = 32768
    """Maximum length of prompt and action together, in tokens."""
    max_images: PositiveInt = 15
    """Maximum number of screenshots in a prompt."""
    max_concurrent_requests: PositiveInt = 256
    """Maximum number of actions that a replica samples at the same time."""
    gpu_memory_utilization: Fraction = 0.85
    """Fraction of GPU memory that the vLLM engine uses."""
    kv_cache_bytes: PositiveBytes | None = None
    """Size of the KV cache in bytes; unset: what `gpu_memory_utilization` leaves. Set it on a CPU."""
    max_action_tokens: PositiveInt = 512
    """Maximum length of an action in tokens."""
    image_cache_bytes: PositiveBytes = 1024**3
    """Size of the screenshot cache in bytes of pixels (2.8 MB for 1280 x 720); there is one in the server process and
    one in the engine process."""
    weight_transfer: Literal["auto", "stream", "ipc", "nccl"] = "auto"
    """Transport of new weights. `stream`: gRPC; `nccl`: from the learner's GPU to another GPU; `ipc`: CUDA IPC on a GPU
    shared with the learner; `auto`: the fastest that both sides support."""
    devices: tuple[Device, ...] = ()
    """Numbers of the replicas' GPUs; each replica takes as many as it has workers. Empty: those that
    `CUDA_VISIBLE_DEVICES` allows."""
    engine_args: Annotated[dict[str, Any], AfterValidator(check_engine_args)] = Field(default_factory=dict)
    """Additional vLLM engine arguments, under vLLM's names."""
    metrics_port: Port = 0
    """Port of the Prometheus metrics of the first replica; further replicas use the following ports. 0 disables
    them. Unset: `deskrl up` and `deskrl eval` choose free ports."""

    @model_validator(mode="after")
    def _check_external_model(self) -> InferenceConfig:
        if (self.external_url is None) != (self.external_model is None):
            raise ValueError("external_url and external_model must be set together")
        return self

    @model_validator(mode="after")
    def _check_quantization_dtype(self) -> InferenceConfig:
        if self.quantization is not None and self.dtype == "float32":
            raise ValueError("quantization requires dtype bfloat16 or float16")
        return self

    @property
    def num_workers(self) -> int:
        """Number of workers of one replica, and so of its GPUs."""
        return int(self.engine_args.get("tensor_parallel_size") or 1)

    @property
    def replica_addresses(self) -> list[HostPort]:
        """Addresses at which other roles reach the replicas."""
        return [self.replica_address(index) for index in range(self.num_replicas)]

    def replica_address(self, index: int) -> HostPort:
        """Return the address of replica `index`: the port of `address` plus the index."""
        return HostPort.of(self.address.host, self.address.port + index)

    def listen_address(self, index: int) -> HostPort:
        """Return the address on which replica `index` listens."""
        return _with_host(self.replica_address(index), self.listen_host)


class SecurityConfig(Section):
    """Authentication and encryption between roles."""

    certificates_dir: Path | None = None
    """Directory of the certificates made by `deskrl certificates`. Set: all channels are encrypted and both ends prove
    their role. Unset: only loopback addresses are allowed."""
    metrics_host: Host = "127.0.0.1"
    """Host on which Prometheus metrics are served. They are unauthenticated: choose a network that only the monitoring
    system can reach."""

    @field_validator("certificates_dir")
    @classmethod
    def _make_absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()
