"""Messages between the OpenEnv server and its client: actions and observations."""

from __future__ import annotations

import base64
import io
from typing import Any

from openenv.core.env_server.types import Action as OpenEnvAction
from openenv.core.env_server.types import Observation
from PIL import Image

from deskrl.actor.actions import Action, ActionKind
from deskrl.core.errors import UserError


class DesktopAction(OpenEnvAction):  # type: ignore[misc]  # its package may not be installed
    """Action: either `kind` with the fields of `deskrl.actor.actions.Action`, or `response`.

    Points are pixels of the screenshot.
    """

    kind: ActionKind | None = None
    x: int = 0
    y: int = 0
    end_x: int = 0
    end_y: int = 0
    scroll_x: int = 0
    scroll_y: int = 0
    keys: tuple[str, ...] = ()
    text: str = ""
    seconds: float = 0.0
    repeat: int = 1
    response: str | None = None
    """Response of a model in the action language of the server's configuration."""

    def answer(self) -> Action | str:
        """Return the action, or the response; raises UserError unless exactly one of the two is given."""
        if (self.kind is None) == (self.response is None):
            raise UserError("the action is not valid", "give either kind or response")
        if self.response is not None:
            return self.response
        return Action(**self.model_dump(exclude={"response", "metadata"}))


class DesktopObservation(Observation):  # type: ignore[misc]  # as above
    """Observation: what the policy gets after a reset and after each action.

    `done` and `reward` are set by the last step; before it, the reward is 0.
    """

    screenshot: str
    """Screenshot: PNG, encoded in base64."""
    instruction: str
    task: str
    seed: int
    num_steps: int
    """Number of actions so far."""
    truncated: bool = False
    """Whether the limit on the number of steps ended the episode."""
    termination: str | None = None
    """Reason of the end, such as `finished`."""
    evidence: dict[str, Any] | None = None
    """What the reward was computed from."""

    def image(self) -> Image.Image:
        """Return the screenshot as an RGB image."""
        return Image.open(io.BytesIO(base64.b64decode(self.screenshot))).convert("RGB")
