"""Contract suite of desktop providers: what `DesktopProvider` and `Desktop` promise, checked on real desktops.

Derive from `DesktopSuite` in a test module, and run it with pytest:

    from deskrl.testing.desktops import DesktopSuite

    class TestBoard(DesktopSuite):
        provider = "drawing_board:BoardProvider"

Commands, files, windows and episodes of an environment are optional: what a desktop does not have is skipped, with the
reason (`pytest -rs`).
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import psutil
import pytest
from PIL import Image

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.base import Desktop, DesktopError, UnsupportedOperation
from deskrl.actor.desktops.provider_registry import make_desktop, reap_desktops, select_provider
from deskrl.core.config import DesktopConfig

T = TypeVar("T")

_NAME = "suite"
_WIDTH, _HEIGHT, _MAX_FILE_BYTES = 640, 480, 1024**2
_SECONDS = 0.05
_ACTIONS = {
    ActionKind.CLICK: Action(ActionKind.CLICK, x=320, y=240),
    ActionKind.DOUBLE_CLICK: Action(ActionKind.DOUBLE_CLICK, x=0, y=0),
    ActionKind.TRIPLE_CLICK: Action(ActionKind.TRIPLE_CLICK, x=320, y=240),
    ActionKind.RIGHT_CLICK: Action(ActionKind.RIGHT_CLICK, x=320, y=240),
    ActionKind.MIDDLE_CLICK: Action(ActionKind.MIDDLE_CLICK, x=320, y=240, keys=("shift",)),
    ActionKind.MOVE: Action(ActionKind.MOVE, x=_WIDTH - 1, y=_HEIGHT - 1),
    ActionKind.DRAG: Action(ActionKind.DRAG, x=100, y=100, end_x=200, end_y=150),
    ActionKind.SCROLL: Action(ActionKind.SCROLL, x=320, y=240, scroll_x=1, scroll_y=-3),
    ActionKind.HOTKEY: Action(ActionKind.HOTKEY, keys=("ctrl", "shift", "a")),
    ActionKind.TYPE: Action(ActionKind.TYPE, text="a line, \u00e4\u00f6\u20ac\u65e5\U0001f600\n\tnext"),
    ActionKind.WAIT: Action(ActionKind.WAIT, seconds=_SECONDS),
    ActionKind.FINISHED: Action(ActionKind.FINISHED),
    ActionKind.INFEASIBLE: Action(ActionKind.INFEASIBLE),
}


class DesktopRunner:
    """Makes desktops of one provider, and runs their operations, each within the time limit of a start.

    Args:
        config: section `desktop` of a run configuration.
        run_root: folder of the desktops.
    """

    def __init__(self, config: DesktopConfig, run_root: Path) -> None:
        self.config = config
        self.run_root = run_root
        self._runner = asyncio.Runner()

    def make(self, name: str = _NAME) -> Desktop:
        """Return a desktop that is not started."""
        return make_desktop(self.config, name, self.run_root)

    def run(self, operation: Coroutine[Any, Any, T]) -> T:
        """Return the result of an operation; skips the test if the desktop does not have it."""
        try:
            return self._runner.run(self._limited(operation))
        except UnsupportedOperation as error:
            pytest.skip(f"{self.config.provider}: {error}")

    def cancel(self, operation: Coroutine[Any, Any, Any]) -> None:
        """Begin an operation and cancel it; raises what the operation raises instead of being cancelled."""

        async def begin_and_cancel() -> None:
            task = asyncio.ensure_future(operation)
            await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

        self._runner.run(begin_and_cancel())

    def close(self) -> None:
        """End the event loop."""
        self._runner.close()

    async def _limited(self, operation: Coroutine[Any, Any, T]) -> T:
        async with asyncio.timeout(self.config.start_timeout_s):
            return await operation


class DesktopSuite:
    """Tests of a provider; derive from it in a class whose name starts with Test."""

    provider: ClassVar[str]
    """Value of `desktop.provider`."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Value of `desktop.provider_options`."""
    settings: ClassVar[Mapping[str, Any]] = {}
    """Other keys of the section `desktop`."""
    lacks: ClassVar[Mapping[str, str]] = {}
    """Reasons why optional operations are not tested, by "commands", "files" and "windows". Needed only for a desktop
    that does not raise UnsupportedOperation."""

    @pytest.fixture(scope="class")
    @classmethod
    def runner(cls) -> Iterator[DesktopRunner]:
        """Runner of the desktops of this class."""
        screen = {"num_envs": 2, "width": _WIDTH, "height": _HEIGHT, "max_file_bytes": _MAX_FILE_BYTES}
        chosen = {"provider": cls.provider, "provider_options": cls.options}
        config = DesktopConfig.model_validate(screen | dict(cls.settings) | chosen)
        with tempfile.TemporaryDirectory(prefix="deskrl-") as folder:
            runner = DesktopRunner(config, Path(folder) / "desktops")
            yield runner
            runner.close()

    @pytest.fixture(scope="class")
    @classmethod
    def desktop(cls, runner: DesktopRunner) -> Iterator[Desktop]:
        """Started desktop that the tests of this class share; no test may break it."""
        desktop = runner.make("shared")
        try:
            runner.run(desktop.start())
            yield desktop
        finally:
            runner.run(desktop.close())

    @pytest.fixture
    def own(self, runner: DesktopRunner) -> Iterator[Desktop]:
        """Desktop of one test, which is not started; it is closed at the end."""
        desktop = runner.make()
        yield desktop
        runner.run(desktop.close())

    def require(self, capability: str) -> None:
        """Skip the test if the desktops lack a capability."""
        if reason := self.lacks.get(capability):
            pytest.skip(f"{self.provider}: {reason}")

    # The provider.

    def test_the_requirements_are_met_on_this_machine(self, runner: DesktopRunner) -> None:
        selected = select_provider(runner.config)
        selected.provider.check_usable(runner.config, selected.options)
        durations = selected.provider.durations(runner.config, selected.options)
        assert min(durations.reset_s, durations.action_s, durations.evaluation_s) >= 0

    def test_desktops_of_a_live_actor_are_not_reaped(self, runner: DesktopRunner, desktop: Desktop) -> None:
        assert reap_desktops(runner.config, runner.run_root) == 0
        assert runner.run(desktop.is_alive())

    # The screen.

    def test_a_screenshot_is_rgb_of_the_configured_size(self, runner: DesktopRunner, desktop: Desktop) -> None:
        for image in (runner.run(desktop.screenshot()), runner.run(desktop.settle()), runner.run(desktop.settle(0.1))):
            assert isinstance(image, Image.Image)
            assert (image.mode, image.size) == ("RGB", (runner.config.width, runner.config.height))

    @pytest.mark.parametrize("kind", ActionKind)
    def test_an_action_of_each_kind_is_executed(
        self, runner: DesktopRunner, desktop: Desktop, kind: ActionKind
    ) -> None:
        before = runner.run(desktop.screenshot())
        runner.run(desktop.act(_ACTIONS[kind]))
        after = runner.run(desktop.settle())
        assert after.size == before.size and runner.run(desktop.is_alive())

    def test_a_screenshot_is_not_changed_by_later_actions(self, runner: DesktopRunner, desktop: Desktop) -> None:
        image = runner.run(desktop.screenshot())
        pixels = image.tobytes()
        runner.run(desktop.act(_ACTIONS[ActionKind.TYPE]))
        runner.run(desktop.settle())
        assert image.tobytes() == pixels

    # The life of a desktop.

    def test_an_idle_desktop_continues(self, runner: DesktopRunner, desktop: Desktop) -> None:
        runner.run(desktop.idle())
        assert runner.run(desktop.is_alive())
        runner.run(desktop.act(_ACTIONS[ActionKind.CLICK]))

    def test_a_desktop_that_is_not_started_is_not_alive_and_can_be_closed(
        self, runner: DesktopRunner, own: Desktop
    ) -> None:
        assert not runner.run(own.is_alive())
        runner.run(own.close())

    def test_a_reset_starts_a_desktop_and_can_be_repeated(self, runner: DesktopRunner, own: Desktop) -> None:
        for _ in range(2):
            runner.run(own.reset())
            assert runner.run(own.is_alive())
            assert runner.run(own.settle()).size == (runner.config.width, runner.config.height)

    def test_a_closed_desktop_leaves_nothing_and_raises_desktop_errors(
        self, runner: DesktopRunner, desktop: Desktop, own: Desktop
    ) -> None:
        before = {process.pid for process in psutil.Process().children(recursive=True)}
        runner.run(own.start())
        runner.run(own.act(_ACTIONS[ActionKind.CLICK]))
        for _ in range(2):
            runner.run(own.close())
        assert {process.pid for process in psutil.Process().children(recursive=True)} <= before
        assert not (runner.run_root / _NAME).exists()
        assert not runner.run(own.is_alive())
        assert isinstance(runner.run(own.death_cause()), str | None)
        for operation in (own.screenshot(), own.settle(), own.act(_ACTIONS[ActionKind.CLICK])):
            with pytest.raises(DesktopError):
                runner.run(operation)
        assert runner.run(desktop.is_alive()), "another desktop of the run was closed"

    @pytest.mark.parametrize("operation", ["reset", "act", "settle"])
    def test_a_desktop_can_be_closed_after_an_operation_was_cancelled(
        self, runner: DesktopRunner, own: Desktop, operation: str
    ) -> None:
        if operation == "reset":
            runner.cancel(own.reset())
        else:
            runner.run(own.start())
            runner.cancel(own.settle() if operation == "settle" else own.act(_ACTIONS[ActionKind.DRAG]))
        runner.run(own.close())
        assert not runner.run(own.is_alive()) and not (runner.run_root / _NAME).exists()

    def test_the_steps_around_an_evaluation_succeed_in_their_order(self, runner: DesktopRunner, own: Desktop) -> None:
        runner.run(own.reset())
        runner.run(own.allow_terminal())
        runner.run(own.end_setup())
        runner.run(own.act(_ACTIONS[ActionKind.CLICK]))
        runner.run(own.stop_policy_programs())
        runner.run(own.redraw())
        assert runner.run(own.screenshot()).mode == "RGB"
        for _ in range(2):
            runner.run(own.stop_all_programs())
        assert runner.run(own.screenshot()).mode == "RGB"

    # Commands.

    def test_a_command_returns_its_output_and_exit_status(self, runner: DesktopRunner, desktop: Desktop) -> None:
        self.require("commands")
        done = runner.run(desktop.execute("echo out; echo err >&2; exit 3", shell=True))
        assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
        assert runner.run(desktop.execute(["echo", "a  b", "$HOME"])).stdout == "a  b $HOME\n"

    def test_a_program_that_cannot_be_started_has_the_exit_status_of_a_shell(
        self, runner: DesktopRunner, desktop: Desktop
    ) -> None:
        self.require("commands")
        assert runner.run(desktop.execute(["no-such-program"])).returncode == 127
        assert runner.run(desktop.execute(["/etc/passwd"])).returncode == 126

    def test_a_command_that_takes_too_long_raises_a_desktop_error(self, runner: DesktopRunner, own: Desktop) -> None:
        self.require("commands")
        runner.run(own.start())
        runner.run(own.execute(["true"]))
        with pytest.raises(DesktopError):
            runner.run(own.execute(["sleep", "1000"], timeout_s=_SECONDS))

    # Files.

    def test_a_file_is_read_as_it_was_written(self, runner: DesktopRunner, desktop: Desktop) -> None:
        self.require("files")
        path = "~/new folder/\u00e4.bin"
        for data in (bytes(range(256)), b"", bytes(_MAX_FILE_BYTES // 2)):
            runner.run(desktop.write_file(path, data))
            assert runner.run(desktop.read_file(path)) == data

    def test_what_cannot_be_read_is_not_found(self, runner: DesktopRunner, desktop: Desktop) -> None:
        self.require("files")
        runner.run(desktop.write_file("~/folder/file", b""))
        for path in ("~/missing", "~/folder", "~/folder/file/below", "/no/such/folder/file"):
            with pytest.raises(FileNotFoundError):
                runner.run(desktop.read_file(path))

    def test_a_file_above_the_size_limit_is_not_found(self, runner: DesktopRunner, desktop: Desktop) -> None:
        self.require("files")
        limit_bytes = runner.config.max_file_bytes
        try:
            runner.run(desktop.write_file("~/large", bytes(limit_bytes + 1)))
        except DesktopError:
            return  # not even written
        with pytest.raises(FileNotFoundError):
            runner.run(desktop.read_file("~/large"))

    def test_a_reset_removes_files(self, runner: DesktopRunner, own: Desktop) -> None:
        self.require("files")
        runner.run(own.start())
        runner.run(own.write_file("~/left", b"by the last episode"))
        runner.run(own.reset())
        with pytest.raises(FileNotFoundError):
            runner.run(own.read_file("~/left"))

    # Windows.

    def test_a_window_that_does_not_appear_raises_a_desktop_error(
        self, runner: DesktopRunner, desktop: Desktop
    ) -> None:
        self.require("windows")
        with pytest.raises(DesktopError):
            runner.run(desktop.wait_for_window("no such window", timeout_s=_SECONDS))

    def test_operations_on_a_window_that_does_not_exist_do_nothing(
        self, runner: DesktopRunner, desktop: Desktop
    ) -> None:
        self.require("windows")
        before = runner.run(desktop.windows())
        assert all({"id", "title", "window_class", "x", "y", "width", "height"} <= set(window) for window in before)
        runner.run(desktop.activate_window("no such window", strict=True))
        runner.run(desktop.close_window("no such window", by_class=True))
        assert len(runner.run(desktop.windows())) == len(before)

    # Episodes of an environment.

    def test_a_seed_decides_on_the_first_screen_of_an_episode(self, runner: DesktopRunner, desktop: Desktop) -> None:
        screens = []
        for _ in range(2):
            instruction = runner.run(desktop.begin_episode(1, {}))
            assert isinstance(instruction, str | None) and not runner.run(desktop.has_episode_ended())
            screens.append(runner.run(desktop.settle()).tobytes())
            runner.run(desktop.act(_ACTIONS[ActionKind.CLICK]))
        assert screens[0] == screens[1]

    def test_an_episode_has_a_reward_that_a_reset_clears(self, runner: DesktopRunner, desktop: Desktop) -> None:
        runner.run(desktop.begin_episode(1, {}))
        before = runner.run(desktop.episode_outcome())
        assert 0 <= before.reward <= 1
        runner.run(desktop.act(_ACTIONS[ActionKind.CLICK]))
        assert 0 <= runner.run(desktop.episode_outcome()).reward <= 1
        runner.run(desktop.reset())
        runner.run(desktop.begin_episode(1, {}))
        assert runner.run(desktop.episode_outcome()) == before
