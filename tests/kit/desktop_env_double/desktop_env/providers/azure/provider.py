"""Double of the provider of Azure, whose package is not installed."""

import azure_is_not_installed  # type: ignore[import-not-found]  # noqa: F401
