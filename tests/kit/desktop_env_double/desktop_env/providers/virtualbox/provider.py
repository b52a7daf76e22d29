"""Double of the provider of VirtualBox."""

from desktop_env.providers import CloudProvider as VirtualBoxProvider

__all__ = ["VirtualBoxProvider"]
