"""The run configuration: one TOML file describes a run, for all of its roles.

Sources by increasing precedence: preset (`preset = "arpo"`), TOML file, environment (`DESKRL_LEARNER__ZERO_STAGE=2`),
command line (`--learner.zero_stage 2`). Unknown keys are rejected. The package imports no engine, so that
`deskrl --help` and errors in a configuration are fast.
"""

from deskrl.core.config.desktop import (
    DesktopConfig,
    DockerConfig,
    EmbeddedConfig,
    OSWorldConfig,
    RemoteConfig,
    SimulatedConfig,
    VMwareConfig,
)
from deskrl.core.config.key_values import value_problem
from deskrl.core.config.learner import (
    EvalConfig,
    GrpoConfig,
    KlEstimator,
    LearnerConfig,
    LoraConfig,
    WarmStartConfig,
)
from deskrl.core.config.loading import (
    dotted,
    dump_config,
    keys_of_file,
    load_config,
    load_values,
    overridden_keys,
    read_resolved,
)
from deskrl.core.config.reward import RewardConfig, RewardTermConfig
from deskrl.core.config.rollout import ActorConfig, AgentConfig, ModelConfig, TasksConfig
from deskrl.core.config.run import RunConfig
from deskrl.core.config.services import InferenceConfig, ReplayConfig, SecurityConfig
from deskrl.core.config.value_types import Section

__all__ = [
    "ActorConfig",
    "AgentConfig",
    "DesktopConfig",
    "DockerConfig",
    "EmbeddedConfig",
    "EvalConfig",
    "GrpoConfig",
    "InferenceConfig",
    "KlEstimator",
    "LearnerConfig",
    "LoraConfig",
    "ModelConfig",
    "OSWorldConfig",
    "RemoteConfig",
    "ReplayConfig",
    "RewardConfig",
    "RewardTermConfig",
    "RunConfig",
    "Section",
    "SecurityConfig",
    "SimulatedConfig",
    "TasksConfig",
    "VMwareConfig",
    "WarmStartConfig",
    "dotted",
    "dump_config",
    "keys_of_file",
    "load_config",
    "load_values",
    "overridden_keys",
    "read_resolved",
    "value_problem",
]
