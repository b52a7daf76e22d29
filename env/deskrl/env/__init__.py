"""Desktops as environments of other trainers: Gymnasium, OpenEnv, TRL and verifiers.

The import registers the environment `deskrl/Desktop-v0` if Gymnasium is installed.
"""

from importlib.util import find_spec

GYMNASIUM_ID = "deskrl/Desktop-v0"
"""Id of the environment for `gymnasium.make`."""

if find_spec("gymnasium") is not None:
    from gymnasium.envs.registration import register

    register(GYMNASIUM_ID, entry_point="deskrl.env.gymnasium_env:GymnasiumDesktop")
