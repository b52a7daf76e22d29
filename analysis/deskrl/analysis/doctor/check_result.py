"""Check result: subject, severity, message and hint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from deskrl.core.errors import UserError


class Severity(StrEnum):
    """Severity of a check result."""

    OK = "ok"
    WARNING = "warning"
    """A run works, but not as well as it could, or this machine cannot check it."""
    ERROR = "error"
    """A run fails unless this is fixed."""


@dataclass(frozen=True)
class CheckResult:
    """Result of one check."""

    subject: str
    severity: Severity
    message: str
    hint: str = ""


def ok(subject: str, message: str) -> CheckResult:
    """Return a result without a problem."""
    return CheckResult(subject, Severity.OK, message)


def warning(subject: str, message: str, hint: str = "") -> CheckResult:
    """Return a warning."""
    return CheckResult(subject, Severity.WARNING, message, hint)


def error(subject: str, message: str, hint: str) -> CheckResult:
    """Return an error."""
    return CheckResult(subject, Severity.ERROR, message, hint)


def failed(subject: str, cause: UserError) -> CheckResult:
    """Return the error of a check that raised."""
    return error(subject, cause.message, cause.hint)


def run_check(subject: str, ok_message: str, check: Callable[[], object]) -> CheckResult:
    """Run a check; its result is the error that it raises as UserError, else `ok_message`."""
    try:
        check()
    except UserError as cause:
        return failed(subject, cause)
    return ok(subject, ok_message)
