"""Exceptions of Volcengine."""


class ApiException(Exception):
    pass
