"""The contract suite of desktop providers fails on desktops that break the contract, by the test that says how."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "desktop"

BROKEN = {
    "transparent": (
        "async def screenshot(self): return (await super().screenshot()).convert('RGBA')",
        "test_a_screenshot_is_rgb_of_the_configured_size",
    ),
    "small": (
        "async def screenshot(self): return (await super().screenshot()).resize((64, 48))",
        "test_a_screenshot_is_rgb_of_the_configured_size",
    ),
    "shared_screenshot": (
        "async def screenshot(self):\n"
        "        self.shared = getattr(self, 'shared', None) or await super().screenshot()\n"
        "        self.shared.paste(await super().screenshot())\n"
        "        return self.shared",
        "test_a_screenshot_is_not_changed_by_later_actions",
    ),
    "without_hotkeys": (
        "async def act(self, action):\n        assert not action.keys\n        await super().act(action)",
        "test_an_action_of_each_kind_is_executed[hotkey]",
    ),
    "immortal": (
        "async def is_alive(self): return True",
        "test_a_desktop_that_is_not_started_is_not_alive_and_can_be_closed",
    ),
    "closed_once": (
        "async def close(self):\n        assert self._is_running\n        await super().close()",
        "test_a_closed_desktop_leaves_nothing_and_raises_desktop_errors",
    ),
    "other_exception": (
        "def _check_running(self): assert self._is_running",
        "test_a_closed_desktop_leaves_nothing_and_raises_desktop_errors",
    ),
    "left_process": (
        "async def start(self):\n"
        "        import subprocess\n"
        "        await self.reset()\n"
        "        self.left = subprocess.Popen(['cat'], stdin=subprocess.PIPE)",
        "test_a_closed_desktop_leaves_nothing_and_raises_desktop_errors",
    ),
    "one_reset": (
        "async def reset(self):\n        assert not self._is_running\n        await super().reset()",
        "test_a_reset_starts_a_desktop_and_can_be_repeated",
    ),
    "forgotten_file": (
        "async def write_file(self, path, data): pass",
        "test_a_file_is_read_as_it_was_written",
    ),
}
"""Body of a desktop that derives from the drawing board, and the test that fails on it."""


def test_each_breach_of_the_contract_fails_the_test_that_names_it(tmp_path: Path) -> None:
    desktops = "from drawing_board import BoardDesktop, BoardProvider\n"
    suites = "from deskrl.testing.desktops import DesktopSuite\n"
    for name, (body, _) in BROKEN.items():
        desktops += f"class {name}(BoardDesktop):\n    {body}\n"
        desktops += f"class {name}_provider(BoardProvider):\n"
        desktops += f"    def make(self, config, options, *_): return {name}(config, options.colours)\n"
        suites += f"class Test_{name}(DesktopSuite):\n    provider = 'broken_desktops:{name}_provider'\n"
    expected = {f"test_broken.py::Test_{name}::{test}" for name, (_, test) in BROKEN.items()}
    (tmp_path / "broken_desktops.py").write_text(desktops)
    (tmp_path / "test_broken.py").write_text(suites)
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=no", "-p", "no:cacheprovider", *sorted(expected)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{EXAMPLE}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert set(re.findall(r"FAILED (\S+)", ended.stdout)) == expected, ended.stdout + ended.stderr
