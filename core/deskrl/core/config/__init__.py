"""The run configuration: one TOML file describes a run, for every role.

Precedence: preset (`preset = "arpo"`) < TOML file < environment (`DESKRL_LEARNER__SEED=1`) < command line
(`--learner.seed 1`). Unknown keys are refused with their dotted path. Knows no role: a role reads its own section and
those of the services it calls. Imports no engine, so that `deskrl --help` and a refused key answer at once.
"""

from deskrl.core.config.desktops import (
    DesktopConfig,
    DockerConfig,
    EmbeddedConfig,
    OSWorldConfig,
    RemoteConfig,
    SimulatedConfig,
    VMwareConfig,
)
from deskrl.core.config.learning import EvalConfig, GrpoConfig, LearnerConfig, WarmStartConfig
from deskrl.core.config.loading import dotted, dump_config, load_config, load_values, overridden_keys, read_resolved
from deskrl.core.config.playing import ActorConfig, AgentConfig, ModelConfig, TasksConfig
from deskrl.core.config.run import RunConfig
from deskrl.core.config.services import InferenceConfig, ReplayConfig, SecurityConfig
from deskrl.core.config.values import Section, refuse_no_address

__all__ = [
    "ActorConfig",
    "AgentConfig",
    "DesktopConfig",
    "DockerConfig",
    "EmbeddedConfig",
    "EvalConfig",
    "GrpoConfig",
    "InferenceConfig",
    "LearnerConfig",
    "ModelConfig",
    "OSWorldConfig",
    "RemoteConfig",
    "ReplayConfig",
    "RunConfig",
    "Section",
    "SecurityConfig",
    "SimulatedConfig",
    "TasksConfig",
    "VMwareConfig",
    "WarmStartConfig",
    "dotted",
    "dump_config",
    "load_config",
    "load_values",
    "overridden_keys",
    "read_resolved",
    "refuse_no_address",
]
