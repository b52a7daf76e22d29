"""What a check comes to: a mark, a word, a mend. Knows no check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from deskrl.core.errors import UserError


class Mark(StrEnum):
    """How it stands with one thing."""

    GOOD = "ok"
    NOTE = "note"
    """Worth knowing: it works, yet worse than it could, or cannot be told from here."""
    BAD = "bad"
    """It has to be mended before a run."""


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    what: str
    mark: Mark
    detail: str
    mend: str = ""


def good(what: str, detail: str) -> Finding:
    """All is well."""
    return Finding(what, Mark.GOOD, detail)


def note(what: str, detail: str, mend: str = "") -> Finding:
    """Worth knowing."""
    return Finding(what, Mark.NOTE, detail, mend)


def bad(what: str, detail: str, mend: str) -> Finding:
    """To be mended."""
    return Finding(what, Mark.BAD, detail, mend)


def attempt(what: str, detail: str, check: Callable[[], object]) -> Finding:
    """`detail` is good if the check raises no UserError, which otherwise says what is wrong."""
    try:
        check()
    except UserError as error:
        return bad(what, error.message, error.mend)
    return good(what, detail)
