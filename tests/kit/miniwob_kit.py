"""Package with the layout and the interface of MiniWoB++'s pages, and a few small pages of its own."""

from __future__ import annotations

import zipfile
from pathlib import Path

CORE = """
var WOB_TASK_READY = true;
var core = {EP_TIMER: null, EPISODE_MAX_TIME: 10000, cover_div: null};
Math.seedrandom = function (seed) {
  var state = seed >>> 0;
  Math.random = function () {
    state = (Math.imul(state ^ (state >>> 15), 2246822519) + 3266489917) >>> 0;
    return state / 4294967296;
  };
};
function add(tag, id) {
  var element = document.createElement(tag);
  element.id = id;
  return document.body.appendChild(element);
}
core.startEpisode = function () {
  if (core.cover_div === null) {
    add("canvas", "click-canvas");
    add("div", "reward-display");
    core.cover_div = add("div", "sync-task-cover");
    core.cover_div.onclick = core.startEpisodeReal;
  }
  core.cover_div.style.display = "block";
};
core.startEpisodeReal = function () {
  genProblem();
  core.cover_div.style.display = "none";
  core.EP_TIMER = setTimeout(function () { core.endEpisode(-1, false, "timed out"); }, core.EPISODE_MAX_TIME);
};
core.endEpisode = function (reward, timeProportional, reason) {
  clearTimeout(core.EP_TIMER);
  core.EP_TIMER = null;
  core.startEpisode();
};
core.hideDisplay = function () { document.getElementById("reward-display").style.display = "none"; };
core.getUtterance = function () { return document.getElementById("query").textContent; };
"""
_PAGE = """<!doctype html>
<link rel="stylesheet" href="../core/core.css">
<script src="../core/core.js"></script>
<script>{script}
window.onload = core.startEpisode;</script>
<div id="query"></div><div id="area"></div>
"""
BUTTONS = """
function genProblem() {
  var words = ["one", "two"];
  var chosen = Math.random() < 0.5 ? 0 : 1;
  document.getElementById("query").textContent = "Press " + words[chosen] + ", case " + Math.floor(Math.random() * 1e6);
  document.getElementById("area").innerHTML = "<button>one</button><button>two</button>";
  document.querySelectorAll("button").forEach(function (button, index) {
    button.onclick = function () { core.endEpisode(index === chosen ? 1 : -1); };
  });
}
"""
"""Page with two buttons of 80 x 100 pixels side by side below the instruction; the right one ends it with reward 1."""
ECHO = """
function genProblem() {
  document.getElementById("query").textContent = "Type.";
  document.getElementById("area").innerHTML = "<input autofocus><div id='echo'></div>";
  var input = document.querySelector("input");
  input.onkeydown = function (event) {
    if (event.key === "Enter") document.getElementById("echo").innerHTML = input.value;
    if (event.key === "F9") core.endEpisode(0.25);
  };
  input.focus();
}
"""
"""Page that inserts typed text as HTML, and that F9 ends with the reward 0.25."""
STYLE = """
body { margin: 0; } #query { height: 50px; background: yellow; } button { width: 80px; height: 100px; }
body { background: url(images/dot.png); }
"""


def write_wheel(folder: Path) -> Path:
    """Write the package as a wheel and return its path."""
    path = folder / "miniwob-0.0.0-py3-none-any.whl"
    files = {
        "miniwob/html/core/core.js": CORE,
        "miniwob/html/core/core.css": STYLE,
        "miniwob/html/core/images/dot.png": "",
        "miniwob/html/core/unused.js": "",
        "miniwob/html/miniwob/two-buttons.html": _PAGE.format(script=BUTTONS),
        "miniwob/html/miniwob/echo.html": _PAGE.format(script=ECHO),
        "miniwob/html/miniwob/broken.html": _PAGE.format(script="function genProblem() { missing(); }"),
        "miniwob/html/miniwob/moving-items.html": _PAGE.format(script=BUTTONS),
        "miniwob/html/other/index.html": "",
        "miniwob/environment.py": "raise ImportError('selenium is not installed')",
        "miniwob-0.0.0.dist-info/licenses/LICENSE": "Permission is granted.",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path
