"""The services that others call, and who may: sections `replay`, `inference` and `security`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from deskrl.core.config.values import Address, Device, Fraction, PositiveInt, PositiveSeconds, Section


def _rehosted(address: str, host: str | None) -> str:
    """`host:port` at another host; None: as it is."""
    return address if host is None else f"{host}:{address.rpartition(':')[2]}"


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
    external_url: str | None = None
    """Base address of an OpenAI-compatible server (http://host:9000/v1) that acts in place of replicas. It takes no
    weights and tells neither token ids nor logprobs nor versions, so for evaluation only. The variable OPENAI_API_KEY
    holds its key, if it wants one."""
    external_model: str | None = None
    """What that server calls the model."""
    join: bool = False
    """This replica is none of those: it is found at its own `address`, which it announces at replay."""
    openai_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the OpenAI-compatible endpoint of the first replica, counting up; 0: none."""
    openai_host: str = "127.0.0.1"
    """Where that endpoint listens. It asks for no certificate, and whoever reaches it can use the model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Numeric type of weights and activations; GPUs older than Ampere (T4, V100) have no bfloat16."""
    quantization: Literal["int4"] | None = None
    """`int4`: the language model's matrices are served in 4 bits, from a copy that is made in the run's folder: an
    eighth of float32, and no longer the policy that learns, so for evaluation only. Unset: weights as they are."""
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

    @field_validator("external_url")
    @classmethod
    def _web_address(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError(f"{value} is no address such as http://host:9000/v1")
        return None if value is None else value.rstrip("/")

    @model_validator(mode="after")
    def _external_model_of_a_server(self) -> InferenceConfig:
        if (self.external_url is None) != (self.external_model is None):
            raise ValueError("external_url and external_model go together")
        return self

    @model_validator(mode="after")
    def _half_precision_beside_integers(self) -> InferenceConfig:
        if self.quantization is not None and self.dtype == "float32":
            raise ValueError("quantization needs the dtype bfloat16 or float16")
        return self

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
