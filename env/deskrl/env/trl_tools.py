"""DesktopTools: a desktop as the tools of a model, for `GRPOTrainer(environment_factory=...)` of TRL.

TRL is not imported: it calls `reset`, offers every other public method to the model as a tool, and takes the reward
from `get_reward`. Results are content blocks of chat templates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

from deskrl.actor.actions import Action, ActionKind
from deskrl.core.ids import derive_seed
from deskrl.env.desktop_env import ConfigSource, DesktopEnv, env_config
from deskrl.env.desktop_fault import DesktopFault
from deskrl.env.episode_player import EpisodePlayer, Turn

_Blocks = list[dict[str, Any]]


def tool_factory(config: ConfigSource = None) -> Callable[[], DesktopTools]:
    """Return the argument `environment_factory` of GRPOTrainer. Each object that it creates has a desktop of its own.

    Raises:
        UserError: see `EpisodePlayer`.
    """
    resolved = env_config(config)
    EpisodePlayer(resolved)  # reports errors of the configuration before the model is loaded
    return lambda: DesktopTools(resolved)


def training_rows(num_rows: int, config: ConfigSource = None) -> list[dict[str, Any]]:
    """Return rows of a dataset, each of which is one group: a task, and the seed of its noise and layout.

    Tasks take turns in the order of the configuration.
    """
    resolved = env_config(config)
    names: Iterator[str] = cycle(EpisodePlayer(resolved).tasks)
    return [
        {"prompt": [{"role": "user", "content": ""}], "task": name, "seed": derive_seed(resolved.seed, number)}
        for number, name in enumerate(islice(names, num_rows))
    ]


class DesktopTools:
    """One desktop whose actions are tools.

    An error in a call, such as a point outside the screenshot, is text that the model gets, and the episode continues.
    TRL turns every exception of a tool into such a text, so that a fault is raised again by `get_reward`.

    Args:
        config: run configuration.
    """

    def __init__(self, config: ConfigSource = None) -> None:
        self._desktop = DesktopEnv(config)
        self._turn: Turn | None = None
        self._fault: DesktopFault | None = None

    def reset(self, seed: int, task: str | None = None, group: str | None = None, **row: Any) -> _Blocks:
        """Start an episode with a row of the dataset; arguments and errors are those of `EpisodePlayer.start`.

        Args:
            seed: seed of the episode.
            task: id of the task; None: the seed chooses one.
            group: see `EpisodePlayer.start`.
            row: other columns, which are not used.

        Returns:
            The screenshot and the instruction, which TRL appends to the prompt.
        """
        self._fault = None
        self._turn = self._desktop.reset(seed, task, group)
        return [_image(self._turn), {"type": "text", "text": self._turn.instruction}]

    def get_reward(self) -> float:
        """Return the reward of the episode. An episode that is still running ends here, and its state is evaluated.

        Raises:
            DesktopFault: the infrastructure ended the episode.
        """
        if self._is_running:
            self._act(Action(ActionKind.FINISHED))
        if self._fault is not None:
            raise self._fault
        if self._turn is None or self._turn.end is None:
            raise RuntimeError("no episode was started")
        return self._turn.end.reward

    def click(self, x: int, y: int, button: str = "left", count: int = 1) -> _Blocks:
        """
        Click at a point of the screenshot.

        Args:
            x: Pixels from the left edge.
            y: Pixels from the top edge.
            button: Mouse button: left, middle or right.
            count: Number of clicks of the left button: 1, 2 or 3.
        """
        kinds = {"left": ("click", "double_click", "triple_click"), "middle": ("middle_click",)}
        names = kinds.get(button, ("right_click",) if button == "right" else ())
        if not 1 <= count <= len(names):
            raise ValueError(f"there is no click with button {button!r} and count {count}")
        return self._act(Action(ActionKind(names[count - 1]), int(x), int(y)))

    def drag(self, x: int, y: int, end_x: int, end_y: int) -> _Blocks:
        """
        Press the left mouse button at one point and release it at another.

        Args:
            x: Pixels from the left edge, where the button is pressed.
            y: Pixels from the top edge, where the button is pressed.
            end_x: Pixels from the left edge, where the button is released.
            end_y: Pixels from the top edge, where the button is released.
        """
        return self._act(Action(ActionKind.DRAG, int(x), int(y), int(end_x), int(end_y)))

    def scroll(self, x: int, y: int, down: int, right: int = 0) -> _Blocks:
        """
        Turn the mouse wheel at a point of the screenshot.

        Args:
            x: Pixels from the left edge.
            y: Pixels from the top edge.
            down: Notches to scroll down; negative numbers scroll up.
            right: Notches to scroll right; negative numbers scroll left.
        """
        return self._act(Action(ActionKind.SCROLL, int(x), int(y), scroll_x=int(right), scroll_y=int(down)))

    def type_text(self, text: str) -> _Blocks:
        """
        Type text where the keyboard focus is.

        Args:
            text: Text to type. A newline presses Enter.
        """
        return self._act(Action(ActionKind.TYPE, text=str(text)))

    def hotkey(self, keys: list[str]) -> _Blocks:
        """
        Press keys together.

        Args:
            keys: Names of the keys in order, such as ["ctrl", "s"] or ["enter"].
        """
        names = [keys] if isinstance(keys, str) else keys
        return self._act(Action(ActionKind.HOTKEY, keys=tuple(str(name) for name in names)))

    def wait(self, seconds: float = 1.0) -> _Blocks:
        """
        Wait, and take a new screenshot.

        Args:
            seconds: Duration in seconds.
        """
        return self._act(Action(ActionKind.WAIT, seconds=float(seconds)))

    def finish(self) -> _Blocks:
        """
        End the task, because it is done.
        """
        return self._act(Action(ActionKind.FINISHED))

    def give_up(self) -> _Blocks:
        """
        End the task, because it cannot be done.
        """
        return self._act(Action(ActionKind.INFEASIBLE))

    @property
    def _is_running(self) -> bool:
        return self._turn is not None and self._turn.end is None and self._fault is None

    def _act(self, action: Action) -> _Blocks:
        if self._is_running:
            try:
                self._turn = self._desktop.step(action)
            except DesktopFault as fault:
                self._fault = fault
        if self._turn is None or not self._is_running:
            return [{"type": "text", "text": "The task has ended."}]
        return [_image(self._turn)]


def _image(turn: Turn) -> dict[str, Any]:
    return {"type": "image", "image": turn.screenshot}
