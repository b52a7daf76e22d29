"""An embedded desktop does what the interface promises, with real applications."""

import asyncio
import tempfile
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from desktop_kit import DEADLINE_S, running_desktop

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.grammar import Turn, parse_turn, render_turn
from deskrl.actor.desktops.base import DesktopError
from deskrl.actor.desktops.embedded import EmbeddedDesktop
from deskrl.actor.desktops.packages import missing_packages
from deskrl.core.config import DesktopConfig, EmbeddedConfig

pytestmark = pytest.mark.skipif(bool(missing_packages()), reason=f"packages missing: {missing_packages()}")

T = TypeVar("T")
CONFIG = DesktopConfig(width=1024, height=640)


async def wait_for_file(desktop: EmbeddedDesktop, path: str, wanted: bytes) -> bytes:
    """What the file holds once it is `wanted`, or when applications had every chance to write it."""
    for _ in range(20):
        data = await desktop.read_file(path)
        if data == wanted:
            break
        await desktop.settle()
    return data


def test_a_screenshot_is_rgb_of_the_configured_size_and_shows_what_is_opened(run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(CONFIG, run_root) as desktop:
            empty = await desktop.screenshot()
            assert (empty.mode, empty.size) == ("RGB", (1024, 640))
            await desktop.launch("xterm")
            await desktop.wait_for_window("xterm")
            assert (await desktop.settle()).tobytes() != empty.tobytes()

    asyncio.run(scenario())


def test_time_that_is_added_passes_before_the_screen_is_looked_at(run_root: Path) -> None:
    slow = EmbeddedConfig(
        added_reset_median_s=0.3, added_reset_sigma=0.0, added_action_median_s=0.2, added_action_sigma=0.0
    )

    async def scenario() -> None:
        async with running_desktop(CONFIG.model_copy(update={"embedded": slow}), run_root) as desktop:
            loop = asyncio.get_running_loop()
            for done, added_s in ((desktop.act(Action(ActionKind.CLICK, x=5, y=5)), 0.2), (desktop.reset(), 0.3)):
                started_s = loop.time()
                await done
                assert loop.time() - started_s >= added_s

    asyncio.run(scenario())


def test_text_is_typed_as_the_policy_wrote_it_into_a_real_application(run_root: Path) -> None:
    uncommon = "".join(map(chr, range(0x400, 0x460)))  # more than the layout has free keycodes: some serve twice
    text = f"<a href=\"x\">'&'</a> äöüß €日本語 😀\n\tnext line: ~^`|\\ {{}}[]\n{uncommon}"

    async def scenario() -> None:
        async with running_desktop(CONFIG, run_root) as desktop:
            await desktop.write_file("~/note.txt", b"")
            await desktop.open_path("~/note.txt")
            await desktop.settle()
            said = render_turn(Turn("I write it down.", Action(ActionKind.TYPE, text=text)), "ui_tars_1_0")
            await desktop.act(parse_turn(said).action)
            await desktop.settle()
            await desktop.act(Action(ActionKind.HOTKEY, keys=("ctrl", "s")))
            assert (await wait_for_file(desktop, "~/note.txt", text.encode())).decode() == text

    asyncio.run(scenario())


PAGE = b"""<title>ready</title><body style="margin:0;width:3000px;height:3000px"><script>
let from = null, moved = false, at = "";
const said = [];
const say = (...words) => { said.push(words.join(" ")); document.title = said.slice(-4).join("; "); };
addEventListener("click", e => { if (!moved) say("clicked", e.screenX, e.screenY); });
addEventListener("dblclick", e => say("doubled", e.screenX, e.screenY));
addEventListener("contextmenu", e => { e.preventDefault(); say("menu", e.screenX, e.screenY); });
addEventListener("mousedown", e => { from = [e.screenX, e.screenY]; });
addEventListener("mouseup", e => {
  moved = from[0] != e.screenX;
  if (moved) say("dragged", ...from, "to", e.screenX, e.screenY);
});
addEventListener("mousemove", e => {
  const here = `${e.screenX} ${e.screenY}`;
  if (!e.buttons && here != at) say("moved", here);  // browsers repeat it when the page changes under the pointer
  at = here;
});
addEventListener("wheel", e => say("wheel", Math.sign(e.deltaX), Math.sign(e.deltaY)));
addEventListener("keydown", e => { if (e.key == "Enter") say("key", e.ctrlKey, e.shiftKey, e.key); });
</script>"""


@pytest.mark.parametrize(
    ("action", "title"),
    [
        (Action(ActionKind.MOVE, x=300, y=400), "moved 300 400"),
        (Action(ActionKind.CLICK, x=310, y=410), "clicked 310 410"),
        (Action(ActionKind.DOUBLE_CLICK, x=420, y=420), "doubled 420 420"),
        (Action(ActionKind.RIGHT_CLICK, x=330, y=430), "menu 330 430"),
        (Action(ActionKind.DRAG, x=300, y=300, end_x=500, end_y=450), "dragged 300 300 to 500 450"),
        (Action(ActionKind.SCROLL, x=400, y=400, scroll_y=3), "wheel 0 1"),
        (Action(ActionKind.SCROLL, x=400, y=400, scroll_x=2), "wheel 1 0"),
        (Action(ActionKind.HOTKEY, keys=("ctrl", "shift", "enter")), "key true true Enter"),
    ],
    ids=lambda value: value.kind.value if isinstance(value, Action) else "",
)
def test_the_browser_sees_every_kind_of_input(browser: "Browser", action: Action, title: str) -> None:
    browser.run(browser.desktop.act(action))
    browser.run(browser.desktop.wait_for_window(title))


def test_two_clicks_on_one_spot_are_no_double_click(browser: "Browser") -> None:
    click = Action(ActionKind.CLICK, x=600, y=500)
    browser.run(browser.desktop.act(click))
    browser.run(browser.desktop.act(click))
    browser.run(browser.desktop.wait_for_window("clicked 600 500; clicked 600 500"))
    browser.run(browser.desktop.settle())
    assert not [window for window in browser.run(browser.desktop.windows()) if "doubled 600" in window["title"]]


class Browser:
    """One desktop with one page in the browser, for all tests of input."""

    def __init__(self, run_root: Path) -> None:
        self.runner = asyncio.Runner()
        self.desktop = EmbeddedDesktop(CONFIG, "browser", run_root)

    def run(self, operation: Coroutine[Any, Any, T]) -> T:
        async def limited() -> T:
            async with asyncio.timeout(DEADLINE_S):
                return await operation

        return self.runner.run(limited())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(prefix="deskrl-test-") as folder:
        browser = Browser(Path(folder) / "desktops")
        try:
            browser.run(browser.desktop.start())
            browser.run(browser.desktop.write_file("~/page.html", PAGE))
            browser.run(browser.desktop.launch(["chromium", "--start-maximized", "/home/user/page.html"]))
            browser.run(browser.desktop.wait_for_window("ready"))
            browser.run(browser.desktop.settle())
            yield browser
        finally:
            browser.run(browser.desktop.close())
            browser.runner.close()


def test_windows_are_found_activated_and_closed_by_part_of_their_title(run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(CONFIG, run_root) as desktop:
            await desktop.launch(["xterm", "-T", "First one"])
            await desktop.wait_for_window("first")
            await desktop.launch(["xterm", "-T", "Second one"])
            await desktop.wait_for_window("second")
            await desktop.activate_window("First one", strict=True)
            await desktop.settle()
            await desktop.act(Action(ActionKind.TYPE, text="exit\n"))
            await desktop.close_window("xterm", by_class=True)
            for _ in range(20):
                await desktop.settle()
                if not await desktop.windows():
                    break
            assert await desktop.windows() == []
            await desktop.activate_window("no such window")  # nothing happens, as in OSWorld

    asyncio.run(scenario())


def test_files_and_commands(run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(CONFIG, run_root) as desktop:
            await desktop.write_file("~/new folder/ä.bin", bytes(range(256)))
            assert await desktop.read_file("/home/user/new folder/ä.bin") == bytes(range(256))
            with pytest.raises(FileNotFoundError):
                await desktop.read_file("~/absent")
            done = await desktop.execute("echo out; echo err >&2; exit 3", shell=True)
            assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
            assert (await desktop.execute(["cat", "~/new folder/ä.bin"])).returncode == 0
            assert (await desktop.execute(["no-such-program"])).returncode == 127
            with pytest.raises(DesktopError, match="not over"):
                await desktop.execute(["sleep", "60"], timeout_s=0.1)

    asyncio.run(scenario())


def test_a_command_is_over_when_it_ends_whatever_it_leaves_in_the_background(run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(CONFIG, run_root) as desktop:
            assert (await desktop.execute("sleep 1000 & echo started", shell=True)).stdout == "started\n"

    asyncio.run(scenario())


def test_a_reset_leaves_nothing_of_the_last_task(run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(CONFIG, run_root) as desktop:
            first = await desktop.settle()
            await desktop.write_file("~/left.txt", b"left")
            await desktop.write_file("/tmp/left.txt", b"left")
            await desktop.launch("mousepad")
            await desktop.wait_for_window("mousepad")
            await desktop.reset()
            assert await desktop.windows() == []
            assert (await desktop.execute("ls ~ /tmp", shell=True)).stdout.count("left") == 0
            assert (await desktop.settle()).tobytes() == first.tobytes()

    asyncio.run(scenario())


@pytest.mark.parametrize("application", ["gimp", "mtpaint", "pcmanfm"])
def test_applications_of_the_suite_come_up(run_root: Path, application: str) -> None:
    async def scenario() -> None:
        async with running_desktop(CONFIG, run_root) as desktop:
            await desktop.launch(application)
            await desktop.wait_for_window(application)

    asyncio.run(scenario())


def test_the_browser_runs_under_the_name_by_which_scripts_look_for_it(browser: Browser) -> None:
    assert browser.run(browser.desktop.execute(["pgrep", "-x", "chrome"])).returncode == 0
