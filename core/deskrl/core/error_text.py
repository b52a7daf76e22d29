"""Errors as text on one line, for messages, logs and results, and their chains of causes."""

from __future__ import annotations

from collections.abc import Iterator


def one_line(error: BaseException | str, max_chars: int | None = None) -> str:
    """Return an error's message on one line, or the name of its type if it has no message.

    Args:
        error: exception, or text to put on one line.
        max_chars: limit on the length; None for no limit.
    """
    return " ".join(str(error).split())[:max_chars] or type(error).__name__


def typed_line(error: BaseException, max_chars: int = 500) -> str:
    """Return the name of an error's type and its message on one line, cut to `max_chars` characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:max_chars]


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and those it was raised from, each once, also if `raise error from error` made a cycle."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
