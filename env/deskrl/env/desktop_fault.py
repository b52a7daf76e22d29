"""Exception of an episode that the infrastructure ended."""

from __future__ import annotations

import re

_FORM = re.compile(r"desktop fault ([a-z_]+): .*", re.DOTALL)


class DesktopFault(RuntimeError):
    """The infrastructure ended the episode, which has no reward. The next reset starts a fresh desktop.

    The exception is a single message, so that it survives processes that raise it again from its text.
    """

    @classmethod
    def of_kind(cls, kind: str, reason: str) -> DesktopFault:
        """Return a fault of a kind as in the metrics of actors, such as `desktop_lost`."""
        return cls(f"desktop fault {kind}: {reason}")

    @classmethod
    def find_in(cls, text: str) -> DesktopFault | None:
        """Return the fault that the text of another process's error contains; None if it contains none."""
        found = _FORM.search(text)
        return cls(found[0]) if found else None

    @property
    def kind(self) -> str:
        """Kind of fault, such as `desktop_lost`."""
        found = _FORM.search(str(self))
        return found[1] if found else "unknown"
