"""Tabs of the desktop's browser, opened and closed from inside the desktop. Knows no task and no other setup step.

OSWorld's client does this from outside through the browser's debugging port; a program inside reaches the same port
on every provider, and needs nothing but the standard library.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from deskrl.actor.desktops.base import Desktop, DesktopError

_PROGRAM = r"""
import json, sys, time, urllib.error, urllib.parse, urllib.request

def ask(port, path, method="GET"):
    request = urllib.request.Request(f"http://localhost:{port}/json/{path}", method=method)
    return urllib.request.urlopen(request, timeout=10).read()

def tabs(port):
    return [tab for tab in json.loads(ask(port, "list")) if tab["type"] == "page"]

def browser(within_s):
    deadline = time.monotonic() + within_s
    while True:
        for port in (1337, 9222):
            try:
                if tabs(port):
                    return port
            except (OSError, ValueError):
                pass
        if time.monotonic() > deadline:
            sys.exit("no browser answers on its debugging port")
        time.sleep(0.1)

def plain(url):
    return url.split("://")[-1].removeprefix("www.").rstrip("/")

job = json.loads(sys.argv[1])
port = browser(job["within_s"])
first = tabs(port)[0]
for url in job["open"]:
    ask(port, "new?" + urllib.parse.quote(url, safe=""), "PUT")
if job["open"]:
    ask(port, "close/" + first["id"])
for url in job["close"]:
    for tab in tabs(port):
        if plain(tab["url"]) == plain(url):
            ask(port, "close/" + tab["id"])
"""

_WITHIN_S = 30.0
_LIMIT_S = 60.0


async def open_tabs(desktop: Desktop, urls: Sequence[str]) -> None:
    """Open a tab for each address, in order, in place of the one that the browser started with.

    Raises:
        DesktopError: no browser runs with a debugging port.
    """
    await _do(desktop, {"open": list(urls), "close": []})


async def close_tabs(desktop: Desktop, urls: Sequence[str]) -> None:
    """Close the tabs that show these addresses.

    Raises:
        DesktopError: no browser runs with a debugging port.
    """
    await _do(desktop, {"open": [], "close": list(urls)})


async def _do(desktop: Desktop, job: dict[str, list[str]]) -> None:
    request = json.dumps(job | {"within_s": _WITHIN_S})
    done = await desktop.execute(["python3", "-c", _PROGRAM, request], timeout_s=_LIMIT_S)
    if done.returncode != 0:
        raise DesktopError((done.stderr.strip() or "the browser's tabs cannot be changed").splitlines()[-1])
