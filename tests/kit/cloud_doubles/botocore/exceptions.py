"""Exceptions of boto3."""


class ClientError(Exception):
    response: dict[str, dict[str, str]] = {}  # noqa: RUF012 # as in botocore
