"""Exceptions of Azure."""


class ResourceNotFoundError(Exception):
    pass
