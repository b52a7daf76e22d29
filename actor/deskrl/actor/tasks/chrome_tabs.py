"""Browser tabs: opens and closes tabs by a program that runs on the desktop.

OSWorld's client does this from outside through the browser's debugging port. A program on the desktop reaches the port
with every provider, and needs only the standard library.
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
            sys.exit("no browser responds on its debugging port")
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

_BROWSER_START_S = 30.0
_TIMEOUT_S = 60.0


async def open_tabs(desktop: Desktop, urls: Sequence[str]) -> None:
    """Open a tab for each URL, in order, and close the tab with which the browser started.

    Raises:
        DesktopError: no browser with a debugging port is running.
    """
    await _run_job(desktop, {"open": list(urls), "close": []})


async def close_tabs(desktop: Desktop, urls: Sequence[str]) -> None:
    """Close the tabs that show these URLs.

    Raises:
        DesktopError: no browser with a debugging port is running.
    """
    await _run_job(desktop, {"open": [], "close": list(urls)})


async def _run_job(desktop: Desktop, job: dict[str, list[str]]) -> None:
    request = json.dumps(job | {"within_s": _BROWSER_START_S})
    result = await desktop.execute(["python3", "-c", _PROGRAM, request], timeout_s=_TIMEOUT_S)
    if result.returncode != 0:
        raise DesktopError((result.stderr.strip() or "the tabs of the browser cannot be changed").splitlines()[-1])
