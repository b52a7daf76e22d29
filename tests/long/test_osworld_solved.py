"""Specification of OSWorld's tasks on the light desktop: reward 0.0 initially, and 1.0 after a script has solved them.

Scripts act like a policy, by keys and clicks, and mostly in a terminal. Skipped without OSWorld's task files, its
evaluators (`deskrl evaluators install`) or the applications.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.actor.desktops.embedded import EmbeddedDesktop
from deskrl.actor.osworld_evaluators.evaluator_environment import installed_evaluators
from deskrl.actor.task import Task
from deskrl.actor.tasks.evaluators import evaluate_task, evaluate_with_osworld
from deskrl.actor.tasks.setup_steps import run_steps, setup_task
from deskrl.actor.tasks.task_schema import read_task
from deskrl.core.config import DesktopConfig

EXAMPLES = Path(__file__).parents[3] / "shared" / "osworld" / "evaluation_examples" / "examples"
CONFIG = DesktopConfig(width=1920, height=1080)
DEADLINE_S = 300.0

pytestmark = [
    pytest.mark.skipif(bool(missing_packages()), reason=f"packages missing: {missing_packages()}"),
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason=f"{EXAMPLES}: not found"),
    pytest.mark.skipif(not installed_evaluators().metrics, reason="OSWorld's evaluators are not installed"),
]

Script = Sequence[Action | str]
"""Actions, and titles of windows to wait for."""


def keys(*names: str) -> Action:
    return Action(ActionKind.HOTKEY, keys=names)


def text(typed: str) -> Action:
    return Action(ActionKind.TYPE, text=typed)


def wait(seconds: float) -> Action:
    return Action(ActionKind.WAIT, seconds=seconds)


def in_terminal(command: str, seconds: float = 1.0) -> Script:
    return [keys("ctrl", "alt", "t"), "Terminal", text(f"{command}\n"), wait(seconds)]


def setting(schema: str, key: str, value: str) -> Script:
    return in_terminal(f"gsettings set {schema} {key} {value}")


def vlc(option: str) -> Script:
    return in_terminal(f"echo '{option}' >> .config/vlc/vlcrc")


def gimp(option: str) -> Script:
    """Change an option while GIMP is not running, because it overwrites the file when it exits."""
    quit_steps: Script = ["GNU Image", wait(3), Action(ActionKind.CLICK, x=1200, y=600), keys("ctrl", "q"), wait(2)]
    return [*quit_steps, *in_terminal(f"echo '{option}' >> .config/GIMP/2.10/gimprc")]


def chrome(change: str) -> Script:
    path = "/home/user/.config/google-chrome/Default/Preferences"
    program = f'import json; f="{path}"; d=json.load(open(f)); {change}; json.dump(d,open(f,"w"))'
    return ["Chromium", wait(2), *in_terminal(f"pkill chrome; sleep 2; python3 -c '{program}'", 4)]


SOLUTIONS: dict[str, Script] = {
    "chrome/af630914-714e-4a24-a7bb-f9af687d3b91": chrome(
        'd.setdefault("webkit",{}).setdefault("webprefs",{})["default_font_size"]=24'
    ),
    "chrome/030eeff7-b492-4218-b312-701ec99ee0cc": chrome('d["enable_do_not_track"]=True'),
    "chrome/2ae9ba84-3a0d-4d4c-8338-3a1478dc5fe3": chrome('d["profile"]["name"]="Thomas"'),
    "gimp/d52d6308-ec58-42b7-a2c9-de80e4837b2b": [
        *("GNU Image", wait(3), Action(ActionKind.CLICK, x=1200, y=600), keys("tab"), wait(1)),
    ],
    "gimp/7b7617bd-57cc-468e-9c91-40c4ec2bcb3d": gimp("(undo-levels 100)"),
    "gimp/7767eef2-56a3-4cea-8c9f-48c070c7d65b": gimp('(theme "Light")'),
    "os/a4d98375-215b-4a4d-aee9-3d4370fccc41": setting("org.gnome.desktop.screensaver", "lock-enabled", "true"),
    "os/bedcedc4-4d72-425e-ad62-21960b11fe0d": setting("org.gnome.desktop.session", "idle-delay", "0"),
    "os/f9be0997-4b7c-45c5-b05c-4612b44a6118": setting("org.gnome.desktop.notifications", "show-banners", "false"),
    "os/3ce045a0-877b-42aa-8d2c-b4a863336ab8": setting("org.gnome.desktop.interface", "text-scaling-factor", "1.5"),
    "vlc/215dfd39-f493-4bc3-a027-8a97d72c61bf": vlc("qt-bgcone=0"),
    "vlc/8ba5ae7a-5ae5-4eab-9fcc-5dd4fe3abf89": vlc("input-record-path=/home/user/Desktop"),
    "vlc/9195653c-f4aa-453d-aa95-787f6ccfaae9": vlc("qt-max-volume=200"),
    "vlc/a5bbbcd5-b398-4c91-83d4-55e1e31bbb81": vlc("qt-minimal-view=1"),
    "vlc/d06f0d4d-2cd5-4ede-8de9-598629438c6e": vlc("qt-slider-colours=20;20;20;20;20;20;20;20;20;20;20;20"),
    "vlc/f3977615-2b45-4ac5-8bba-80c17dbe2a37": vlc("one-instance-when-started-from-file=0"),
}
PROGRAMS = {"chrome": ("chromium",), "gimp": ("gimp",), "os": ("gsettings", "bc"), "vlc": ("vlc",)}


@pytest.mark.parametrize("task_path", SOLUTIONS)
def test_a_script_solves_a_task_of_osworld(task_path: str, tmp_path: Path) -> None:
    missing = [name for name in PROGRAMS[task_path.partition("/")[0]] if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    task = read_task(EXAMPLES / f"{task_path}.json")

    async def run() -> list[float]:
        desktop = EmbeddedDesktop(CONFIG, "d", tmp_path)
        try:
            async with asyncio.timeout(DEADLINE_S):
                return [await _run_script(desktop, task, script) for script in ([], SOLUTIONS[task_path])]
        finally:
            await desktop.close()

    assert asyncio.run(run()) == [0.0, 1.0]


async def _run_script(desktop: EmbeddedDesktop, task: Task, script: Script) -> float:
    """Return the reward by OSWorld's evaluators after a script; the built-in evaluators must agree if they apply."""
    await desktop.reset()
    await setup_task(desktop, task, 0)
    await desktop.settle()
    for item in script:
        if isinstance(item, str):
            await desktop.wait_for_window(item, timeout_s=60.0)
        else:
            await desktop.act(item)
            await desktop.settle()
    osworld = await evaluate_with_osworld(desktop, task, await run_steps(desktop, task.id, task.evaluator.postconfig))
    default = await evaluate_task(desktop, task, Action(ActionKind.FINISHED))  # stops all programs
    assert default.reward == osworld.reward, json.dumps([default.evidence, osworld.evidence])
    return osworld.reward
