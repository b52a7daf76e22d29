"""Gymnasium environment in a process of its own, so that its crashes, hangs and leaks end an episode and no actor."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from PIL import Image

from deskrl.actor.desktops.base import DesktopError, DesktopGone
from deskrl.actor.environments.environment_desktop import Environment, Observation
from deskrl.actor.environments.gestures import Gesture
from deskrl.actor.environments.gymnasium_settings import GymnasiumSettings
from deskrl.actor.helper_process import HelperProcess
from deskrl.actor.image_decoding import MAX_PIXELS
from deskrl.core.errors import UserError
from deskrl.core.process_lifecycle import supervised_environment

_PROGRAM = "deskrl.actor.environments.gymnasium_process"
_MAX_LINE_BYTES = 1024**2
_STOP_TIMEOUT_S = 2.0
_BYTES_PER_PIXEL = 3


class GymnasiumEnvironment(Environment):
    """One environment.

    Args:
        settings: what is made, and how it is used.
    """

    def __init__(self, settings: GymnasiumSettings) -> None:
        self._settings = settings
        self._process: HelperProcess | None = None
        self._is_busy = False

    async def open(self) -> None:
        """Start the process and make the environment (see the base class)."""
        command = [sys.executable, "-P", "-m", _PROGRAM]
        self._process = await HelperProcess.start(command, {**os.environ, **supervised_environment()}, _MAX_LINE_BYTES)
        await self._exchange(self._settings.to_line())

    async def reset(self, seed: int, parameters: Mapping[str, Any]) -> Observation:
        """Reset the environment; `parameters` are the options of its reset (see the base class)."""
        reply = await self._exchange(_line({"reset": {"seed": seed, "options": parameters}}))
        return await self._observation(reply)

    async def step(self, gesture: Gesture) -> Observation | None:
        """Execute a gesture (see the base class)."""
        step = {"name": gesture.name, "values": gesture.values, "image_size": gesture.image_size}
        reply = await self._exchange(_line({"step": step}))
        return None if "ignored" in reply else await self._observation(reply)

    async def close(self) -> None:
        """Close the environment and end its process."""
        if self._process is not None and self._is_busy:  # it hangs, or a call was cancelled
            await self._process.kill()
        elif self._process is not None:
            await self._process.stop(_STOP_TIMEOUT_S)

    def end_cause(self) -> str | None:
        """Return why the process does not run; None if it runs."""
        if self._process is None:
            return "the environment was not started"
        status = self._process.returncode
        if status is None:
            return None
        if status < 0:
            return f"the environment's process was ended by {signal.Signals(-status).name}"
        return f"the environment's process ended with the exit status {status}"

    async def _exchange(self, line: bytes) -> dict[str, Any]:
        assert self._process is not None
        self._is_busy = True
        try:
            await self._process.send(line)
            reply = await self._process.output.readline()
        except OSError:
            reply = b""
        except ValueError as error:
            raise DesktopError(f"the environment's reply is longer than {_MAX_LINE_BYTES} bytes") from error
        if not reply.endswith(b"\n"):
            await self._process.wait()
            raise DesktopGone(self.end_cause() or "the environment's process sent no reply")
        self._is_busy = False
        return _checked(json.loads(reply))

    async def _observation(self, reply: dict[str, Any]) -> Observation:
        assert self._process is not None
        width, height = reply["size"]
        if width * height > MAX_PIXELS:
            raise DesktopError(f"the environment's image has {width} x {height} pixels, more than {MAX_PIXELS}")
        try:
            pixels = await self._process.output.readexactly(_BYTES_PER_PIXEL * width * height)
        except EOFError as error:
            await self._process.wait()
            raise DesktopGone(self.end_cause() or "the environment's process sent no image") from error
        image = Image.frombytes("RGB", (width, height), pixels)
        return Observation(image, reply["reward"], reply["end"], reply["instruction"])


def _line(request: dict[str, Any]) -> bytes:
    return json.dumps(request).encode() + b"\n"


def _checked(reply: dict[str, Any]) -> dict[str, Any]:
    """Return a reply; raises UserError or DesktopError if it is one."""
    if "mistake" in reply:
        raise UserError(f"desktop.provider_options: {reply['mistake']}", reply["hint"])
    if "error" in reply:
        raise DesktopError(str(reply["error"]))
    return reply
