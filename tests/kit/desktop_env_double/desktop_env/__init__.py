"""Double of desktop-env for machines without the package: only its factory of providers."""
