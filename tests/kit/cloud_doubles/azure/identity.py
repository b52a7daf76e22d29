"""Double of azure-identity."""


class DefaultAzureCredential:
    pass
