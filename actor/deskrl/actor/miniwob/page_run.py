"""Run of a MiniWoB++ page on a desktop: start it with a seed, and read its reward through the browser's DevTools.

A page reports its end by calling `core.endEpisode`. `start_page` replaces this function by one that sends the raw
reward through a DevTools binding, once. The function of the binding and a random token are known to the closure of the
replacement only, and the DevTools connection is held by the guest server, which the policy's programs cannot reach. A
page that is loaded again has neither, so that its rewards are not accepted. A content security policy, which the page
gets once its own scripts are loaded, keeps text that is typed into a page and that the page inserts as HTML from being
executed.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from deskrl.actor.desktops.base import Desktop, DesktopError, UnsupportedOperation
from deskrl.actor.guest.session_sandbox import HOME
from deskrl.actor.miniwob.page_files import PAGES_FOLDER, page_dependencies
from deskrl.core.ids import derive_seed

PAGE_WIDTH, PAGE_HEIGHT = 160, 210
"""Size of a page in CSS pixels."""
SPLITS = ("train", "heldout")
"""Disjoint sets of seeds."""
_BINDING_EVENT = "Runtime.bindingCalled"
_GUEST_FOLDER = f"{HOME}/.miniwob"
_START_TIMEOUT_S = 20.0
_POLL_S = 0.05
_MAX_REASON_CHARACTERS = 200
_LONGEST_MS = 2**31 - 1

_IS_LOADED = "typeof core === 'object' && core.cover_div !== null && document.readyState === 'complete'"
_IS_READY = "WOB_TASK_READY === true"
_START = """
(() => {
  const send = window[NAME];
  delete window[NAME];
  const end = core.endEpisode;
  let hasEnded = false;
  core.endEpisode = function (reward, isTimeScaled, reason) {
    if (core.EP_TIMER === null || hasEnded) return;
    hasEnded = true;
    send(JSON.stringify({ token: TOKEN, raw: Number(reward) || 0, reason: reason == null ? null : String(reason) }));
    return end.call(core, reward, false, reason);
  };
  core.EPISODE_MAX_TIME = LONGEST;
  Math.seedrandom(SEED);
  core.startEpisodeReal();
  core.hideDisplay();
  document.getElementById('click-canvas').style.display = 'none';
  const policy = document.createElement('meta');
  policy.httpEquiv = 'Content-Security-Policy';
  policy.content = "script-src 'none'";
  document.head.append(policy);
  return core.getUtterance();
})()
"""


@dataclass(frozen=True)
class PageEnd:
    """End of a page that was reached by the policy."""

    raw_reward: float
    """Reward that the page gave, without a deduction for time; from -1 to 1."""
    reason: str | None
    """Reason that the page gave."""


_tokens: WeakKeyDictionary[Desktop, str] = WeakKeyDictionary()


def page_seed(page: str, split: str, seed: int) -> int:
    """Return the seed of a page's random numbers: an even number for the split `train`, an odd one for `heldout`."""
    return 2 * (derive_seed("miniwob", page, seed) % 2**30) + SPLITS.index(split)


async def start_page(desktop: Desktop, html: Path, page: str, seed: int) -> str:
    """Open a page in a browser that fills the screen, start it, and return its instruction.

    Args:
        desktop: desktop that was reset.
        html: folder of the html files.
        page: name of the page.
        seed: seed of the page's random numbers.

    Raises:
        DesktopError: the page did not start.
        OSError: a file of the page cannot be read.
    """
    for name in await asyncio.to_thread(page_dependencies, html, page):
        data = await asyncio.to_thread((html / name).read_bytes)
        await desktop.write_file(f"{_GUEST_FOLDER}/{name}", data)
    width, height = (await desktop.screenshot()).size
    scale = max(1, min(width // PAGE_WIDTH, height // PAGE_HEIGHT))
    url = f"file://{_GUEST_FOLDER}/{PAGES_FOLDER}/{page}.html"
    options = ["--remote-debugging-pipe", "--kiosk", f"--force-device-scale-factor={scale}"]
    try:
        await desktop.start_browser(["chromium", *options, url], [_BINDING_EVENT])
        return await _begin(desktop, seed)
    except UnsupportedOperation:
        raise
    except DesktopError as error:
        raise DesktopError(f"the MiniWoB++ page {page} did not start: {error}") from error


async def read_end(desktop: Desktop) -> PageEnd | None:
    """Return the first end of the page that `start_page` has started; None if it has not ended.

    Raises:
        DesktopError: the guest server did not reply.
    """
    token = _tokens.get(desktop)
    if token is None:
        return None
    for event in await desktop.browser_events():
        if (end := _parse_end(event, token)) is not None:
            return end
    return None


async def _begin(desktop: Desktop, seed: int) -> str:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    session_id = await _attach(desktop, deadline_s)
    await _wait_until(desktop, session_id, _IS_LOADED, deadline_s)
    name, token = f"b{secrets.token_hex(8)}", secrets.token_hex(16)
    await desktop.call_browser("Runtime.addBinding", {"name": name}, session_id)
    values = {"NAME": json.dumps(name), "TOKEN": json.dumps(token), "LONGEST": str(_LONGEST_MS), "SEED": str(seed)}
    script = _START
    for key, value in values.items():
        script = script.replace(key, value)
    instruction = await _evaluate(desktop, session_id, script)
    await _wait_until(desktop, session_id, _IS_READY, deadline_s)
    _tokens[desktop] = token
    return str(instruction)


async def _attach(desktop: Desktop, deadline_s: float) -> str:
    """Attach to the page and return the DevTools session."""
    while True:
        targets = (await desktop.call_browser("Target.getTargets", {}))["targetInfos"]
        if pages := [target for target in targets if target["type"] == "page"]:
            break
        await _pause(deadline_s, "the browser opened no page")
    arguments = {"targetId": pages[0]["targetId"], "flatten": True}
    return str((await desktop.call_browser("Target.attachToTarget", arguments))["sessionId"])


async def _wait_until(desktop: Desktop, session_id: str, condition: str, deadline_s: float) -> None:
    while await _evaluate(desktop, session_id, condition) is not True:
        await _pause(deadline_s, "it did not load")


async def _pause(deadline_s: float, reason: str) -> None:
    if time.monotonic() > deadline_s:
        raise DesktopError(f"{reason} within {_START_TIMEOUT_S:g} s")
    await asyncio.sleep(_POLL_S)


async def _evaluate(desktop: Desktop, session_id: str, expression: str) -> Any:
    arguments = {"expression": expression, "returnByValue": True}
    outcome = await desktop.call_browser("Runtime.evaluate", arguments, session_id)
    if "exceptionDetails" in outcome:
        details = outcome["exceptionDetails"]
        text = details.get("exception", {}).get("description") or details.get("text", "")
        raise DesktopError(text.splitlines()[0] if text else "script error")
    return outcome["result"].get("value")


def _parse_end(event: dict[str, Any], token: str) -> PageEnd | None:
    """Return the end that an event reports; None if it is another event, or not of the script of `start_page`."""
    try:
        sent = json.loads(event["params"]["payload"])
        if not secrets.compare_digest(str(sent["token"]), token):
            return None
        reason = sent["reason"]
        return PageEnd(float(sent["raw"]), None if reason is None else str(reason)[:_MAX_REASON_CHARACTERS])
    except (KeyError, TypeError, ValueError):
        return None
