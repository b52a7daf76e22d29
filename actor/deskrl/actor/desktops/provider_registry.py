"""Registry of desktop providers, and creation, check and clean-up of desktops of the provider `desktop.provider`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deskrl.actor.desktops.base import Desktop
from deskrl.actor.desktops.desktop_env_machine import DesktopEnvProvider
from deskrl.actor.desktops.docker import DockerProvider
from deskrl.actor.desktops.embedded import EmbeddedProvider
from deskrl.actor.desktops.orphan_cleanup import reap_orphans
from deskrl.actor.desktops.osworld import OSWorldProvider
from deskrl.actor.desktops.provider import DesktopProvider
from deskrl.actor.desktops.remote import RemoteProvider
from deskrl.actor.desktops.simulated import SimulatedProvider
from deskrl.actor.desktops.vmware import VMwareProvider
from deskrl.actor.environments.gymnasium_provider import GymnasiumProvider
from deskrl.actor.environments.openenv_provider import OpenEnvProvider
from deskrl.core.config import DesktopConfig
from deskrl.core.error_text import typed_line
from deskrl.core.errors import UserError
from deskrl.core.registry import Registry, subclass_problem

PROVIDERS: Registry[type[DesktopProvider]] = Registry(
    "desktop provider", "desktop.provider", "deskrl.desktops", partial(subclass_problem, base=DesktopProvider)
)
PROVIDERS.register("embedded")(EmbeddedProvider)
PROVIDERS.register("docker")(DockerProvider)
PROVIDERS.register("osworld")(OSWorldProvider)
PROVIDERS.register("vmware")(VMwareProvider)
PROVIDERS.register("desktop_env")(DesktopEnvProvider)
PROVIDERS.register("remote")(RemoteProvider)
PROVIDERS.register("simulated")(SimulatedProvider)
PROVIDERS.register("gymnasium")(GymnasiumProvider)
PROVIDERS.register("openenv")(OpenEnvProvider)


@dataclass(frozen=True)
class SelectedProvider:
    """The configured provider with its validated options."""

    provider: DesktopProvider
    options: Any
    """Instance of the provider's `Options`; None if it has none."""


def select_provider(config: DesktopConfig) -> SelectedProvider:
    """Return the provider of a configuration with its options.

    Raises:
        UserError: the provider is unknown or cannot be created, or it rejects the options.
    """
    selected = PROVIDERS.select(config.provider, config.provider_options)
    try:
        return SelectedProvider(selected.implementation(), selected.options)
    except Exception as error:  # a provider of the user's own may raise anything
        raise _provider_failed(config, "cannot be created", error) from error


def make_desktop(config: DesktopConfig, name: str, run_root: Path) -> Desktop:
    """Create a desktop without starting it.

    Args:
        config: section `desktop` of the run configuration.
        name: unique name among the run's desktops; used as the name of a folder or a container.
        run_root: folder of all desktops of the run; its path must be short because it contains Unix sockets.

    Raises:
        UserError: a requirement of the provider is not met on this machine.
    """
    check_usable(config)
    selected = select_provider(config)
    try:
        return selected.provider.make(config, selected.options, name, run_root)
    except UserError:
        raise
    except Exception as error:
        raise _provider_failed(config, "make failed", error) from error


def check_usable(config: DesktopConfig) -> None:
    """Raise UserError if the provider cannot be selected, or a requirement of it is not met on this machine."""
    selected = select_provider(config)
    try:
        selected.provider.check_usable(config, selected.options)
    except UserError:
        raise
    except Exception as error:
        raise _provider_failed(config, "check_usable failed", error) from error


def reap_desktops(config: DesktopConfig, run_root: Path) -> int:
    """Terminate and remove the run's desktops whose actor was killed; return their number."""
    selected = select_provider(config)
    num_reaped = selected.provider.reap(config, selected.options, run_root)
    return max(num_reaped, reap_orphans(run_root))  # a desktop of `docker` has both a container and a folder


def describe_added_delays(config: DesktopConfig) -> str:
    """Return a description of the delays that the configuration adds to all desktops; empty if it adds none."""
    selected = select_provider(config)
    return selected.provider.describe_added_delays(config, selected.options)


def _provider_failed(config: DesktopConfig, what: str, error: Exception) -> UserError:
    return UserError(f"desktop.provider: {config.provider}: {what}: {typed_line(error)}", "correct the provider")
