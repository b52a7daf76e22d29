"""Module by whose name verifiers finds deskrl's desktops: `vf-eval deskrl_desktops` with this folder on PYTHONPATH."""

from deskrl.env.verifiers_env import DesktopTaskset, DesktopVerifiersEnv

__all__ = ["DesktopTaskset", "DesktopVerifiersEnv"]
