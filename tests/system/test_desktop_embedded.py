"""Embedded desktops implement the desktop interface with real applications."""

import asyncio
import tempfile
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from desktop_kit import DEADLINE_S, running_desktop
from PIL import Image

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import PolicyResponse
from deskrl.actor.agent.ui_tars import UiTars10
from deskrl.actor.agent.ui_tars_parser import parse_response
from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.actor.desktops.embedded import EmbeddedDesktop
from deskrl.actor.desktops.http_client import GuestResponse, send_request
from deskrl.core.config import DesktopConfig, EmbeddedConfig

pytestmark = pytest.mark.skipif(bool(missing_packages()), reason=f"packages missing: {missing_packages()}")

T = TypeVar("T")
CONFIG = DesktopConfig(width=1024, height=640)


async def wait_for_file(desktop: EmbeddedDesktop, path: str, expected: bytes) -> bytes:
    """Return the file once it equals `expected`, or its last contents after repeated waiting."""
    for _ in range(20):
        data = await desktop.read_file(path)
        if data == expected:
            break
        await desktop.settle()
    return data


def test_a_screenshot_shows_opened_windows(run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(CONFIG, run_root) as desktop:
            empty = await desktop.screenshot()
            await desktop.launch("xterm")
            await desktop.wait_for_window("xterm")
            assert (await desktop.settle()).tobytes() != empty.tobytes()

    asyncio.run(scenario())


def test_a_screenshot_that_is_sent_as_changed_rows_is_the_screen(run_root: Path) -> None:
    async def get_screen(desktop: EmbeddedDesktop, known_frame: str = "") -> GuestResponse:
        target = f"/deskrl/screenshot?known_frame={known_frame}"
        return await send_request(desktop.address, "GET", target, max_bytes=4 * 1024 * 640, timeout_s=DEADLINE_S)

    async def scenario() -> None:
        async with running_desktop(CONFIG, run_root) as desktop:
            await desktop.launch(["mousepad"])
            await desktop.wait_for_window("mousepad")
            for number in range(6):
                await desktop.settle()
                await desktop.act(Action(ActionKind.TYPE, text=f"line {number}\n"))
                await desktop.act(Action(ActionKind.MOVE, x=100 * number, y=90 * number))
                screenshot = await desktop.settle()
                whole = await get_screen(desktop)
                expected = Image.frombytes("RGB", (1024, 640), whole.body, "raw", "BGRX")
                assert screenshot.tobytes() == expected.tobytes()
            unchanged = await get_screen(desktop, whole.headers["x-frame"])
            assert unchanged.body == b"" and unchanged.headers["x-rows"] == ""

    asyncio.run(scenario())


def test_configured_delays_are_added_to_actions_and_resets(run_root: Path) -> None:
    slow = EmbeddedConfig(
        added_reset_median_s=0.3, added_reset_sigma=0.0, added_action_median_s=0.2, added_action_sigma=0.0
    )

    async def scenario() -> None:
        async with running_desktop(CONFIG.model_copy(update={"embedded": slow}), run_root) as desktop:
            loop = asyncio.get_running_loop()
            for operation, added_s in ((desktop.act(Action(ActionKind.CLICK, x=5, y=5)), 0.2), (desktop.reset(), 0.3)):
                started_s = loop.time()
                await operation
                assert loop.time() - started_s >= added_s

    asyncio.run(scenario())


def test_a_real_application_receives_text_exactly_as_the_policy_wrote_it(run_root: Path) -> None:
    uncommon = "".join(map(chr, range(0x400, 0x460)))  # more than the layout has free keycodes, so some are reused
    text = f"<a href=\"x\">'&'</a> äöüß €日本語 😀\n\tnext line: ~^`|\\ {{}}[]\n{uncommon}"

    async def scenario() -> None:
        async with running_desktop(CONFIG, run_root) as desktop:
            await desktop.write_file("~/note.txt", b"")
            await desktop.open_path("~/note.txt")
            await desktop.settle()
            response = UiTars10().render(PolicyResponse("I write it down.", Action(ActionKind.TYPE, text=text)))
            await desktop.act(parse_response(response).action)
            await desktop.settle()
            await desktop.act(Action(ActionKind.HOTKEY, keys=("ctrl", "s")))
            assert (await wait_for_file(desktop, "~/note.txt", text.encode())).decode() == text

    asyncio.run(scenario())


PAGE = b"""<title>ready</title><body style="margin:0;width:3000px;height:3000px"><script>
let from = null, moved = false, at = "";
const events = [];
const report = (...words) => { events.push(words.join(" ")); document.title = events.slice(-4).join("; "); };
const held = e => e.shiftKey ? ["shift"] : [];
addEventListener("click", e => { if (!moved) report("clicked", e.screenX, e.screenY, ...held(e)); });
addEventListener("click", e => { if (e.detail == 3) report("tripled", e.screenX, e.screenY); });
addEventListener("auxclick", e => { if (e.button == 1) report("middle", e.screenX, e.screenY, ...held(e)); });
addEventListener("dblclick", e => report("doubled", e.screenX, e.screenY));
addEventListener("contextmenu", e => { e.preventDefault(); report("menu", e.screenX, e.screenY); });
addEventListener("mousedown", e => { from = [e.screenX, e.screenY]; });
addEventListener("mouseup", e => {
  moved = from[0] != e.screenX;
  if (moved) report("dragged", ...from, "to", e.screenX, e.screenY);
});
addEventListener("mousemove", e => {
  const here = `${e.screenX} ${e.screenY}`;
  if (!e.buttons && here != at) report("moved", here);  // browsers repeat it when the page changes under the pointer
  at = here;
});
addEventListener("wheel", e => report("wheel", Math.sign(e.deltaX), Math.sign(e.deltaY)));
addEventListener("keydown", e => { if (e.key == "Enter") report("key", e.ctrlKey, e.shiftKey, e.key); });
let presses = 0, pressed = 0;
addEventListener("keydown", e => {
  if (e.key == "F8" && !e.repeat) { presses += 1; pressed = e.timeStamp; report("pressed", presses); }
});
addEventListener("keyup", e => { if (e.key == "F8") report("held", e.timeStamp - pressed > 400); });
</script>"""


@pytest.mark.parametrize(
    ("action", "title"),
    [
        (Action(ActionKind.MOVE, x=300, y=400), "moved 300 400"),
        (Action(ActionKind.CLICK, x=310, y=410), "clicked 310 410"),
        (Action(ActionKind.DOUBLE_CLICK, x=420, y=420), "doubled 420 420"),
        (Action(ActionKind.TRIPLE_CLICK, x=440, y=420), "tripled 440 420"),
        (Action(ActionKind.RIGHT_CLICK, x=330, y=430), "menu 330 430"),
        (Action(ActionKind.MIDDLE_CLICK, x=340, y=430), "middle 340 430"),
        (Action(ActionKind.CLICK, x=350, y=430, keys=("shift",)), "clicked 350 430 shift"),
        (Action(ActionKind.DRAG, x=300, y=300, end_x=500, end_y=450), "dragged 300 300 to 500 450"),
        (Action(ActionKind.SCROLL, x=400, y=400, scroll_y=3), "wheel 0 1"),
        (Action(ActionKind.SCROLL, x=400, y=400, scroll_x=2), "wheel 1 0"),
        (Action(ActionKind.HOTKEY, keys=("ctrl", "shift", "enter")), "key true true Enter"),
        (Action(ActionKind.HOTKEY, keys=("f8",), repeat=3), "pressed 3; held false"),
        (Action(ActionKind.HOTKEY, keys=("f8",), seconds=0.5), "held true"),
    ],
    ids=lambda value: value.kind.value if isinstance(value, Action) else "",
)
def test_the_browser_receives_every_kind_of_input(browser: "Browser", action: Action, title: str) -> None:
    browser.run(browser.desktop.act(action))
    browser.run(browser.desktop.wait_for_window(title))


def test_two_click_actions_at_one_point_are_not_a_double_click(browser: "Browser") -> None:
    click = Action(ActionKind.CLICK, x=600, y=500)
    browser.run(browser.desktop.act(click))
    browser.run(browser.desktop.act(click))
    browser.run(browser.desktop.wait_for_window("clicked 600 500; clicked 600 500"))
    browser.run(browser.desktop.settle())
    assert not [window for window in browser.run(browser.desktop.windows()) if "doubled 600" in window["title"]]


class Browser:
    """Desktop that shows one page in the browser, shared by all tests of input."""

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


def test_windows_can_be_found_activated_and_closed_by_part_of_their_title(run_root: Path) -> None:
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
            await desktop.activate_window("no such window")  # does nothing, as in OSWorld

    asyncio.run(scenario())


def test_a_command_returns_when_it_ends_even_if_background_processes_remain(run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(CONFIG, run_root) as desktop:
            assert (await desktop.execute("sleep 1000 & echo started", shell=True)).stdout == "started\n"

    asyncio.run(scenario())


def test_a_reset_removes_files_and_windows_of_the_last_task(run_root: Path) -> None:
    async def scenario() -> None:
        async with running_desktop(CONFIG, run_root) as desktop:
            first = await desktop.settle()
            await desktop.write_file("~/remaining.txt", b"text")
            await desktop.write_file("/tmp/remaining.txt", b"text")
            await desktop.launch("mousepad")
            await desktop.wait_for_window("mousepad")
            await desktop.reset()
            assert await desktop.windows() == []
            assert (await desktop.execute("ls ~ /tmp", shell=True)).stdout.count("remaining") == 0
            assert (await desktop.settle()).tobytes() == first.tobytes()

    asyncio.run(scenario())


@pytest.mark.parametrize("application", ["gimp", "mtpaint", "pcmanfm"])
def test_applications_of_the_suite_open_a_window(run_root: Path, application: str) -> None:
    async def scenario() -> None:
        async with running_desktop(CONFIG, run_root) as desktop:
            await desktop.launch(application)
            await desktop.wait_for_window(application)

    asyncio.run(scenario())


def test_the_browser_process_is_named_chrome(browser: Browser) -> None:
    assert browser.run(browser.desktop.execute(["pgrep", "-x", "chrome"])).returncode == 0
