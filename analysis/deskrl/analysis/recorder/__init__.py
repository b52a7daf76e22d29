"""`deskrl record TASK`: a browser page on which a person plays a task on a live desktop and saves a demonstration.

`recorder_app` serves the page; `deskrl.actor.recording` runs the episode.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

from deskrl.actor.agent.external_apis import policy_opener
from deskrl.actor.agent.external_server import check_reachable
from deskrl.actor.agent.inference_client import InferenceClient
from deskrl.actor.agent.policies import ActorPolicy, open_served_policy
from deskrl.actor.demonstrations import Demonstration, create_folder
from deskrl.actor.desktops.provider_registry import make_desktop
from deskrl.actor.recording import Recording
from deskrl.actor.task import Task
from deskrl.actor.tasks.task_choice import select_task
from deskrl.analysis.loopback_server import LoopbackServer
from deskrl.analysis.recorder.recorder_app import RecorderApp
from deskrl.core import process_lifecycle, rpc
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.left_out import count_of
from deskrl.core.process_lifecycle import StopEvent
from deskrl.proto.v1 import rollout_pb2

__all__ = ["record"]

_DEFAULT_ROOT = Path("demonstrations")
_LAST_PAGE_S = 3.0
"""Time in seconds for which the server waits until the page has been told how the episode ended."""

_OpenPolicy = Callable[[rollout_pb2.Rollout], ActorPolicy]


def record(config: RunConfig, name: str, folder: Path | None, port: int, policy: str | None) -> int:
    """Serve the page of one recording until its episode has ended, or until SIGINT or SIGTERM.

    Args:
        config: run configuration with the policy's server in the section `inference`.
        name: task, as in `select_task`.
        folder: folder to write the demonstration to; None: a new one in demonstrations/.
        port: port on the loopback address; 0: any free port.
        policy: address of the policy's server; None: only the person plays.

    Returns:
        Exit status: 0 if the demonstration was judged or discarded, else 1.

    Raises:
        UserError: the task cannot be played here, the folder exists, the desktop does not start, or the port cannot be
            used.
    """
    task, config = select_task(config, name)
    stop = process_lifecycle.stop_event()
    folder = folder or _new_folder(task)
    with tempfile.TemporaryDirectory(prefix="deskrl-") as directory:
        return asyncio.run(_record(config, task, folder, port, policy, Path(directory), stop))


def _new_folder(task: Task) -> Path:
    """Return the first folder for a demonstration of a task that does not exist."""
    name = re.sub(r"[^\w.-]+", "-", task.id)
    return next(path for number in itertools.count(1) if not (path := _DEFAULT_ROOT / f"{name}-{number}").exists())


async def _record(
    config: RunConfig, task: Task, folder: Path, port: int, policy: str | None, directory: Path, stop: StopEvent
) -> int:
    desktop = make_desktop(config.desktop, "record", directory)
    async with _policy_server(config, policy) as open_policy:
        recording = Recording(config, task, desktop, folder, open_policy)
        app = RecorderApp(recording, secrets.token_urlsafe(24))
        server = LoopbackServer(app.application, port)
        create_folder(folder)
        try:
            async with server:
                print(f"recording {task.id} at {server.url}?token={app.token} (Ctrl-C to stop)", flush=True)
                try:
                    demonstration = await _run_until(recording, stop)
                finally:
                    await app.wait_until_seen(_LAST_PAGE_S)
        finally:
            await desktop.close()
    return _report(demonstration, folder)


def _report(demonstration: Demonstration | None, folder: Path) -> int:
    """Print how the recording ended, and return the exit status."""
    if demonstration is None:
        print("discarded", flush=True)
        return 0
    if not demonstration.steps:
        print(f"nothing was saved, because no step was played: {demonstration.fault}", flush=True)
        return 1
    steps = count_of(len(demonstration.steps), "step")
    if demonstration.reward is None:
        print(f"saved {steps} without a reward in {folder}: {demonstration.fault}", flush=True)
        return 1
    reward = f"the reward {demonstration.reward:g} ({demonstration.termination})"
    print(f"saved {steps} with {reward} in {folder}", flush=True)
    return 0


async def _run_until(recording: Recording, stop: StopEvent) -> Demonstration | None:
    """Run a recording, and end its episode when a stop is requested."""
    running = asyncio.create_task(recording.run())
    stopping = asyncio.create_task(stop.wait_async())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    recording.stop()
    return await running


@contextlib.asynccontextmanager
async def _policy_server(config: RunConfig, policy: str | None) -> AsyncIterator[_OpenPolicy | None]:
    """Provide what opens the policy at a server for a rollout; None without a server."""
    if policy is None:
        yield None
    elif is_url(policy):
        if config.inference.external_api != "chat_completions":
            api = config.inference.external_api
            message = (
                f"inference.external_api: {api}: its policy keeps a conversation that a person cannot take part in"
            )
            raise UserError(message, "use chat_completions, or record without --policy")
        check_reachable(config.inference)
        yield policy_opener(config)
    else:
        rpc.load_own_identity("actor", config.security.certificates_dir)
        if not rpc.check_health(policy):
            raise UserError(
                f"{policy}: no replica answers", "give the address of a replica, as `deskrl status` shows it"
            )
        client = InferenceClient(config.inference, "record", config.actor.act_timeout_s)
        try:
            yield partial(open_served_policy, client)
        finally:
            await client.close()


def is_url(policy: str) -> bool:
    """Return whether the address of a policy's server is that of an external server."""
    return policy.startswith(("http://", "https://"))
