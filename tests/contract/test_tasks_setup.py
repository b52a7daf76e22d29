"""Specification of setup steps on a real desktop: the effect of each type, and errors."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from file_server_kit import Site, serving

from deskrl.actor.desktops.base import Desktop
from deskrl.actor.desktops.embedded import EmbeddedDesktop
from deskrl.actor.task import Task
from deskrl.actor.tasks.asset_fetch import fetch_assets
from deskrl.actor.tasks.setup_steps import SetupError, setup_task
from deskrl.actor.tasks.task_schema import parse_task
from deskrl.core.config import DesktopConfig

Step = tuple[str, dict[str, Any]]


class Stage:
    """Desktop with the event loop on which it runs."""

    def __init__(self, runner: asyncio.Runner, desktop: Desktop) -> None:
        self._runner = runner
        self.desktop = desktop

    def set_up(self, *steps: Step, seed: int = 0) -> None:
        self._runner.run(setup_task(self.desktop, task(*steps), seed))

    def read(self, path: str) -> bytes:
        return self._runner.run(self.desktop.read_file(path))

    def titles(self) -> str:
        return self._runner.run(self.desktop.execute(["wmctrl", "-l"])).stdout


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    desktop = EmbeddedDesktop(DesktopConfig(), "d", tmp_path_factory.mktemp("setup"))
    with asyncio.Runner() as runner:
        runner.run(desktop.start())
        yield Stage(runner, desktop)
        runner.run(desktop.close())


def task(*steps: Step) -> Task:
    config = [{"type": kind, "parameters": parameters} for kind, parameters in steps]
    evaluator = {"func": "infeasible"}
    return parse_task(
        json.dumps({"id": "t", "instruction": "-", "config": config, "evaluator": evaluator}).encode(), "t"
    )


LIST_TABS = """
import json, urllib.request
tabs = json.load(urllib.request.urlopen("http://localhost:1337/json/list"))
json.dump([tab["url"] for tab in tabs if tab["type"] == "page"], open("/home/user/tabs.json", "w"))
"""
"""Program that runs on the desktop and writes the URLs of the browser's tabs to a file."""


def test_files_are_uploaded_from_inline_text_base64_or_a_local_path(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "local.txt").write_bytes(b"local")
    files = [
        {"path": "~/folder/text.txt", "content": "ä\n"},
        {"path": "~/lines.txt", "content": ["a", "b", ""]},
        {"path": "~/bytes.bin", "base64": base64.b64encode(b"\0\xff").decode()},
        {"path": "~/local.txt", "local_path": str(tmp_path / "local.txt")},
    ]
    stage.set_up(("upload_file", {"files": files}))
    assert stage.read("~/folder/text.txt").decode() == "ä\n"
    assert stage.read("~/lines.txt") == b"a\nb\n"
    assert stage.read("~/bytes.bin") == b"\0\xff"
    assert stage.read("/home/user/local.txt") == b"local"


def test_commands_run_to_completion_whatever_their_exit_status(stage: Stage) -> None:
    stage.set_up(
        ("execute", {"command": ["touch", "one"]}),
        ("command", {"command": "touch two; false", "shell": True}),
        ("execute", {"command": "echo three > three", "shell": "true"}),
    )
    assert [stage.read(f"~/{name}") for name in ("one", "two", "three")] == [b"", b"", b"three\n"]


def test_placeholders_in_commands_are_replaced(stage: Stage) -> None:
    words = "{SCREEN_WIDTH} {SCREEN_HEIGHT} {SCREEN_WIDTH_HALF} {SCREEN_HEIGHT_HALF} {CLIENT_PASSWORD} {SEED}"
    stage.set_up(("execute", {"command": f"echo {words} > words", "shell": True}), seed=7)
    assert stage.read("~/words") == b"1280 720 640 360 password 7\n"


def test_a_command_is_repeated_until_its_condition_is_met(stage: Stage) -> None:
    command = "echo x >> tries; wc -l < tries"
    stage.set_up(("execute", {"command": command, "shell": True, "until": {"stdout": "3"}}))
    assert stage.read("~/tries") == b"x\nx\nx\n"


def test_applications_are_launched_and_their_windows_awaited_activated_and_closed(stage: Stage) -> None:
    stage.set_up(
        ("launch", {"command": ["xterm", "-T", "First"]}),
        ("launch", {"command": "xterm -T Second", "shell": True}),
        ("execute_with_verification", {"command": ["true"], "verification": {"window_exists": "First"}}),
        ("execute_with_verification", {"command": ["true"], "verification": {"window_exists": "Second"}}),
        ("activate_window", {"window_name": "First"}),
        ("close_window", {"window_name": "Second", "strict": True}),
        (
            "execute_with_verification",
            {"command": ["true"], "verification": {"command_success": "! wmctrl -l | grep Second"}},
        ),
    )
    assert "First" in stage.titles()


def test_a_file_is_opened_with_its_application(stage: Stage) -> None:
    stage.set_up(
        ("upload_file", {"files": [{"path": "~/letter.txt", "content": "Dear all\n"}]}),
        ("open", {"path": "/home/user/letter.txt"}),
    )
    assert "letter.txt" in stage.titles()


def test_browser_tabs_replace_the_first_tab_and_are_closed(stage: Stage) -> None:
    pages = [f"file:///home/user/{name}.html" for name in ("one", "two", "three")]
    files = [{"path": page.removeprefix("file://"), "content": "<p>"} for page in pages]
    stage.set_up(
        ("upload_file", {"files": files}),
        ("launch", {"command": ["google-chrome", "--remote-debugging-port=1337"]}),
        ("chrome_open_tabs", {"urls_to_open": pages}),
        ("chrome_close_tabs", {"urls_to_close": [pages[1]]}),
        ("execute", {"command": ["python3", "-c", LIST_TABS]}),
        ("command", {"command": "pkill chrome", "shell": True}),
    )
    assert sorted(json.loads(stage.read("~/tabs.json"))) == sorted([pages[0], pages[2]])


def test_a_download_reads_the_asset_cache(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(Site(files={"/a.txt": b"copy"})) as site:
        url = site.address("/a.txt")
        fetch_assets([url])
    stage.set_up(("download", {"files": [{"url": url, "path": "/home/user/Desktop/a.txt"}]}))
    assert stage.read("~/Desktop/a.txt") == b"copy"


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (("googledrive", {}), "step 0 has the unknown type googledrive"),
        (("launch", {}), "step 0 (launch): KeyError: 'command'"),
        (("sleep", {"seconds": "long"}), "step 0 (sleep): ValueError"),
        (("upload_file", {"files": [{"path": "x", "base64": "%"}]}), "step 0 (upload_file)"),
        (("upload_file", {"files": [{"path": "x", "local_path": "/nowhere/x"}]}), "/nowhere/x"),
        (("download", {"files": [{"url": "https://example.org/none", "path": "x"}]}), "no local copy of https://exa"),
        (
            (
                "execute_with_verification",
                {"command": ["true"], "verification": {"command_success": "false"}, "max_wait_time": 0.1},
            ),
            "'false' did not succeed within 0.1 s",
        ),
    ],
)
def test_a_step_that_fails_is_an_error_with_its_index_and_type(stage: Stage, step: Step, reason: str) -> None:
    with pytest.raises(SetupError) as caught:
        stage.set_up(step)
    assert reason in str(caught.value)
