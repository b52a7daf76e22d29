"""Replies of guest servers: their fields and types, which are checked while a reply is parsed."""

from __future__ import annotations

from typing import NotRequired, TypedDict

import msgspec


class Acknowledgement(msgspec.Struct):
    """Reply to an operation that returns nothing: any JSON object."""


class CommandReply(msgspec.Struct):
    """Result of a command that ran to its end."""

    returncode: int
    output: str = ""
    error: str = ""


class WindowRecord(TypedDict):
    """Window on the screen; position and size in pixels."""

    id: int
    title: str
    window_class: str
    x: int
    y: int
    width: int
    height: int
    is_splash: NotRequired[bool]
    stack_position: NotRequired[int | None]
    is_setup_program: NotRequired[bool]
    executable: NotRequired[str]
