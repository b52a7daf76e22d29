"""Network addresses: `host:port` with IPv4 addresses, IPv6 addresses in brackets, or host names."""

from __future__ import annotations

import ipaddress
import re
from typing import Self
from urllib.parse import urlsplit

from pydantic_core import core_schema

_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_MAX_NAME_CHARACTERS = 253
_MAX_SHOWN_CHARACTERS = 80
_EXAMPLE = "write host:port, such as 127.0.0.1:7411, [::1]:7411 or replay.example:7411"
_HOST_EXAMPLE = "write a host name or an IP address without a port, such as 127.0.0.1 or ::1"


class AddressError(ValueError):
    """Text is not an address.

    Args:
        message: what is wrong.
        hint: what the user can do about it, in the imperative.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class HostPort(str):
    """Address of a server: text of the form `host:port`, with IPv6 addresses in brackets, and its two parts.

    Args:
        text: address, such as `127.0.0.1:7411`, `[::1]:7411` or `replay.example:7411`.

    Raises:
        AddressError: the text has another form, or the port is not from 1 to 65535.
    """

    host: str
    """Host name or IP address, without brackets."""
    port: int

    def __new__(cls, text: str) -> Self:
        """Parse the text."""
        _check_no_extras(text, _EXAMPLE)
        bracketed, closing, rest = text.rpartition("]")
        host, colon, port = rest.rpartition(":")
        if closing and (not bracketed.startswith("[") or host):
            raise AddressError(f"{_shown(text)} is not an address", _EXAMPLE)
        if not closing and ":" in host:
            hint = f"put an IPv6 address in brackets, such as [{host}]:{port}" if port else _EXAMPLE
            raise AddressError(f"{_shown(text)} has more than one colon", hint)
        if not colon:
            raise AddressError(f"{_shown(text)} has no port", _EXAMPLE)
        if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
            raise AddressError(f"the port of {_shown(text)} is not a number from 1 to 65535", _EXAMPLE)
        host = _check_ipv6(bracketed[1:], text, _EXAMPLE) if closing else _check_name(host, text, _EXAMPLE)
        return cls._of_parts(host, int(port))

    @classmethod
    def of(cls, host: str, port: int) -> Self:
        """Return the address of a port of a host, which may be an IPv6 address with or without brackets."""
        return cls._of_parts(host.removeprefix("[").removesuffix("]"), port)

    @classmethod
    def _of_parts(cls, host: str, port: int) -> Self:
        address = super().__new__(cls, format_address(host, port))
        address.host, address.port = host, port
        return address

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: object) -> core_schema.CoreSchema:
        """Return the schema by which pydantic validates the text and serialises it as text."""
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())

    def __reduce__(self) -> tuple[type[HostPort], tuple[str]]:
        """Return what pickle and copy need to create the address again."""
        return type(self), (str(self),)


def format_address(host: str, port: int) -> str:
    """Return `host:port`, with brackets around an IPv6 address. The port may be 0, which stands for any free port."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_host(text: str) -> str:
    """Return a host name or an IP address, without brackets.

    Raises:
        AddressError: the text has another form, for example a port.
    """
    _check_no_extras(text, _HOST_EXAMPLE)
    if text.startswith("[") and text.endswith("]"):
        return _check_ipv6(text[1:-1], text, _HOST_EXAMPLE)
    return _check_ipv6(text, text, _HOST_EXAMPLE) if ":" in text else _check_name(text, text, _HOST_EXAMPLE)


def _check_no_extras(text: str, example: str) -> None:
    """Raise AddressError for parts of a URL and for characters that no address contains."""
    if "://" in text:
        raise AddressError(f"{_shown(text)} is a URL, not an address", f"omit the scheme: {example}")
    if "@" in text:
        raise AddressError(f"{_shown(text)} contains a user name", f"omit the user name: {example}")
    if not text.isascii() or any(character.isspace() or not character.isprintable() for character in text):
        raise AddressError(f"{_shown(text)} contains a space or a character that no address contains", example)
    if "/" in text:
        raise AddressError(f"{_shown(text)} contains a path", f"omit the path: {example}")


def _check_ipv6(host: str, text: str, example: str) -> str:
    try:
        return str(ipaddress.IPv6Address(host))
    except ValueError as error:
        raise AddressError(f"{_shown(text)}: {_shown(host)} is not an IPv6 address", example) from error


def _check_name(host: str, text: str, example: str) -> str:
    labels = host.removesuffix(".").split(".")
    if len(host) > _MAX_NAME_CHARACTERS or not all(_LABEL.fullmatch(label) for label in labels):
        raise AddressError(f"{_shown(text)} has no valid host name", example)
    if labels[-1].isdigit():  # resolvers read such a name as an IPv4 address, some of them with parts left out
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError as error:
            raise AddressError(f"{_shown(text)}: {host} is not an IPv4 address", example) from error
    return host


def _shown(text: str) -> str:
    """Return text for a message: quoted if it is empty or not printable ASCII, and cut to a line."""
    cut = text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[:_MAX_SHOWN_CHARACTERS]}…"
    return cut if cut.isprintable() and cut.strip() == cut != "" else repr(cut)


def check_base_url(text: str) -> str:
    """Return the base URL of an HTTP server without a slash at its end.

    Raises:
        ValueError: it is not a URL of the scheme http or https with a host, or has a user name, query or fragment.
    """
    parts = urlsplit(text)  # raises ValueError for malformed IPv6 addresses
    is_plain = text.isascii() and text.isprintable() and " " not in text
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or not is_plain:
        raise ValueError(f"must be a URL, such as http://host:9000/v1, not {text!r}")
    if parts.port == 0 or parts.username is not None:  # `port` raises ValueError for numbers above 65535
        raise ValueError(f"must have a port from 1 to 65535 and no user name, not {text!r}")
    check_host(parts.hostname)
    return text.rstrip("/")
