"""Double of a provider."""
