"""Specification of windows as evidence: only titles that an application of the setup sets on demand count."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from deskrl.actor.actions import Action
from deskrl.actor.desktops.base import CommandResult
from deskrl.actor.desktops.simulated import SimulatedDesktop
from deskrl.actor.tasks import setup_windows
from deskrl.actor.tasks.setup_windows import note_setup_windows, rewritten_title
from deskrl.core.config import DesktopConfig

Window = dict[str, Any]


def window(number: int, title: str = "", *, program: str = "/usr/bin/viewer", is_setup: bool = True) -> Window:
    return {"id": number, "title": title, "is_setup_program": is_setup, "executable": program}


class WindowDesktop(SimulatedDesktop):
    """Desktop with given windows. `on_key` and `on_list` stand for what programs do at these moments."""

    def __init__(self) -> None:
        super().__init__(DesktopConfig(), "d")
        self.records = [window(1, "page 1")]
        self.on_key: Callable[[], None] = self.rewrite
        self.on_list: Callable[[], None] = lambda: None

    def rewrite(self) -> None:
        self.records[0]["title"] = "page 1"

    async def windows(self) -> list[Window]:
        self.on_list()
        return [dict(record) for record in self.records]

    async def act(self, action: Action) -> None:
        self.on_key()

    async def execute(
        self, command: str | Sequence[str], *, shell: bool = False, timeout_s: float = 30.0
    ) -> CommandResult:
        for record in self.records:
            if str(record["id"]) == command[-1]:
                record["title"] = ""
        return CommandResult(0, "", "")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_windows, "_QUIET_S", 0.001)
    monkeypatch.setattr(setup_windows, "_REWRITE_S", 0.005)
    monkeypatch.setattr(setup_windows, "_POLL_S", 0.001)


def title_after(change: Callable[[WindowDesktop], None]) -> str | None:
    """Return the title that counts after the policy has changed something."""

    async def scenario() -> str | None:
        desktop = WindowDesktop()
        await note_setup_windows(desktop)
        change(desktop)
        return await rewritten_title(desktop, ["viewer"], ["c"])

    return asyncio.run(scenario())


def test_the_title_that_the_application_sets_is_returned() -> None:
    assert title_after(lambda desktop: None) == "page 1"


def test_a_title_that_a_program_has_set_before_does_not_count() -> None:
    assert title_after(lambda desktop: desktop.records[0].update(title="page 4")) == "page 1"


def test_a_window_whose_application_does_not_respond_has_no_title() -> None:
    def freeze(desktop: WindowDesktop) -> None:
        desktop.records[0]["title"] = "page 4"
        desktop.on_key = lambda: None

    assert title_after(freeze) is None


def test_a_title_that_is_set_without_the_key_does_not_count() -> None:
    def forge(desktop: WindowDesktop) -> None:
        desktop.on_list = lambda: desktop.records[0].update(title="page 4")

    assert title_after(forge) is None


def test_a_title_that_changes_again_does_not_count() -> None:
    titles = iter(f"page {number}" for number in range(1000))

    def forge(desktop: WindowDesktop) -> None:
        def change() -> None:
            if desktop.records[0]["title"]:
                desktop.records[0]["title"] = next(titles)

        desktop.on_list = change

    assert title_after(forge) is None


@pytest.mark.parametrize(
    "records",
    [
        [],
        [window(2, "page 4")],
        [window(1, "page 4", is_setup=False)],
        [window(1, "page 4", program="/usr/bin/xterm")],
    ],
    ids=["no window", "opened later", "of the policy", "of another program"],
)
def test_other_windows_do_not_count(records: list[Window]) -> None:
    assert title_after(lambda desktop: setattr(desktop, "records", records)) is None
