"""`deskrl view` beside a replay service that goes on writing: what a person finds, filters and steps through.

The store is filled over gRPC as actors fill it; the viewer is a process of its own, and the browser is a real one.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from browser_kit import Browser
from PIL import Image
from replay_kit import OpenStream, ReplayClient, ReplayProcess, begin, fault, image, replay_config, result

from deskrl.core.cli import main
from deskrl.core.config import dump_config
from deskrl.core.ids import image_hash
from deskrl.core.runfolder import RunFolder
from deskrl.core.scores import EpisodeScores, write_scores
from deskrl.core.trajectory import Span, Step, encode_step
from deskrl.proto.v1 import replay_pb2, rollout_pb2

EVIL = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)>{{ 7*7 }}"
CLICK = {"kind": "click", "x": 320, "y": 180}
PATIENCE_S = 30


def picture(colour: str) -> bytes:
    """A screenshot."""
    buffer = io.BytesIO()
    Image.new("RGB", (640, 360), colour).save(buffer, "PNG")
    return buffer.getvalue()


def turn(index: int, text: str, action: dict[str, Any], version: int) -> Iterator[rollout_pb2.StreamEpisodeRequest]:
    """A screenshot and what the policy did about it."""
    shot = picture(("#d0e0f0", "#f0e0d0", "#d0f0e0")[index % 3])
    name = image_hash(shot)
    step = Step(
        index=index,
        screenshot=name,
        images=(name,),
        text=text,
        prompt_ids=(1, 2, 3),
        action_ids=(4, 5),
        logprobs=(-0.5, -2.25),
        spans=(Span("first-line", version, 0, 2),),
        action=action,
    )
    yield rollout_pb2.StreamEpisodeRequest(
        step=rollout_pb2.EpisodeStep(index=index, image_hashes=[name], payload=encode_step(step)),
        images=[image(shot)],
    )


def play(client: ReplayClient, reward: float, version: int, text: str = "Thought: Go.\nAction: click(1,1)") -> str:
    """Play the next planned rollout: a click, then `finished`; returns its name."""
    lease = client.acquire()
    turns = [*turn(0, text, CLICK, version), *turn(1, "Action: finished()", {"kind": "finished"}, version)]
    assert client.stream([begin(lease), *turns, result(reward, 2)])[-1] == (2, True)
    return lease.rollout.episode_id


class Viewer:
    """A viewer process."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "deskrl.core.cli", "view", str(folder), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.url = re.search(r"http://127\.0\.0\.1:\d+", line)[0]  # type: ignore[index]

    def get(self, path: str, **headers: str) -> str:
        """A page's markup."""
        request = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as page:
            text: str = page.read().decode()
        return text

    def names(self, path: str) -> list[str]:
        """The episodes that a list shows, in its order."""
        return [unescape(name) for name in re.findall(r'class="soft">([^<]+\.\d+)</span></a>', self.get(path))]

    def status(self, path: str, **headers: str) -> int:
        """How a request is answered."""
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=PATIENCE_S):
                return 200
        except urllib.error.HTTPError as error:
            return error.code

    def close(self) -> int:
        """Ctrl-C."""
        self.process.terminate()
        self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplayProcess]:
    """A run: two groups of task `fold` (the first learnt from, the second rescued by its success), one of `paint`."""
    process = ReplayProcess(replay_config(tmp_path_factory.mktemp("view"), max_faults=0))
    client = process.client()
    client.plan("train/0", task_id="fold")
    play(client, 1.0, version=0)
    play(client, 0.0, version=1, text=f"Thought: {EVIL}\nAction: {EVIL}")
    assert client.take("train", "train/000001", 0) is not None
    client.commit("train", "train/000001")
    scores = EpisodeScores(0.5, False, logprobs=(-0.5, -2.0, -0.5, -2.25), entropies=(0.1, 1.5, 0.2, 0.3))
    write_scores(RunFolder(process.config.folder), "train/000001", {"train/0": {"train/0.0": scores}}, keep=1)
    client.set_updates(1)
    client.plan("train/1", task_id="fold")
    for _ in range(2):
        play(client, 0.0, version=2)
    assert client.take("train", "train/000002", 0) is not None
    client.commit("train", "train/000002", replay_pb2.GroupVerdict(group_id="train/1", used_candidate=True))
    client.plan("eval/paint", task_id="paint", num=2)
    client.stream([begin(client.acquire()), fault("the screen went black")])
    play(client, 1.0, version=3)
    yield process
    process.close()


@pytest.fixture(scope="module")
def viewer(replay: ReplayProcess) -> Iterator[Viewer]:
    process = Viewer(replay.config.folder)
    yield process
    assert process.close() == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", ["eval/paint.1", "eval/paint.0", "train/1.1", "train/1.0", "train/0.1", "train/0.0"]),
        ("task=paint", ["eval/paint.1", "eval/paint.0"]),
        ("queue=train&outcome=solved", ["train/0.0"]),
        ("outcome=failed", ["train/1.1", "train/1.0", "train/0.1"]),
        ("outcome=faulted", ["eval/paint.0"]),
        ("fault=2", ["eval/paint.0"]),
        ("fault=3", []),
        ("termination=1&task=fold&version=2", ["train/1.1", "train/1.0"]),
        ("version=0", ["train/0.0"]),
        ("task=fold&before=3", ["train/0.1", "train/0.0"]),
    ],
)
def test_episodes_are_found_by_what_they_are(viewer: Viewer, query: str, expected: list[str]) -> None:
    assert viewer.names(f"/?{query}") == expected


def test_a_step_shows_what_the_policy_saw_did_and_sampled(viewer: Viewer, browser: Browser, tmp_path: Path) -> None:
    browser.open(f"{viewer.url}/episode/train/0.0?step=1")
    assert browser.evaluate("document.querySelector('.thought').textContent") == "Go."
    assert browser.evaluate("document.querySelector('.action').textContent") == "click(1,1)"
    circle = "document.querySelector('.large circle.mark')"
    assert browser.evaluate(f"[{circle}.cx.baseVal.value, {circle}.cy.baseVal.value]") == [320, 180]
    told = browser.evaluate("[...document.querySelectorAll('.tokens span')].map(it => it.title)")
    assert [re.findall(r"logprob (\S+)\nversion (\d)", title) for title in told] == [
        [("-0.5000", "0")],
        [("-2.2500", "0")],
    ]
    eager = "it => { it.loading = 'eager'; return it.decode().then(() => it.naturalWidth); }"
    assert browser.evaluate(f"Promise.all([...document.images].map({eager}))") == [640, 400, 400]
    assert browser.evaluate("document.querySelector('.large img').naturalWidth") == 640
    browser.press("ArrowRight")
    browser.wait_for_load()
    assert browser.evaluate("location.search") == "?step=2"
    assert browser.evaluate("document.querySelector('.large .badge').textContent") == "finished"
    browser.press("ArrowLeft")
    browser.wait_for_load()
    assert browser.evaluate("location.search") == "?step=1"
    assert browser.complaints == []


def test_what_the_learner_made_of_it_is_beside_what_was_sampled(viewer: Viewer, browser: Browser) -> None:
    browser.open(f"{viewer.url}/episode/train/0.0?step=1")
    told = browser.evaluate("[...document.querySelectorAll('.tokens span')].map(it => it.title)")
    assert "learner's logprob -2.0000, difference +2.5e-01\nentropy 1.500 nats" in told[1]
    assert "advantage +0.5" in browser.evaluate("document.querySelector('.head').textContent")
    heat = "getComputedStyle(document.querySelectorAll('.tokens span')[1]).getPropertyValue('--heat')"
    browser.evaluate("document.querySelector('[value=difference]').click()")
    assert float(browser.evaluate(heat)) == 0.25
    browser.open(f"{viewer.url}/episode/train/0.1?step=1")
    assert browser.evaluate("document.querySelector('[value=difference]')") is None, "no scores are kept of it"


def test_a_changed_filter_applies_at_once_and_a_row_leads_to_its_episode(viewer: Viewer, browser: Browser) -> None:
    browser.open(f"{viewer.url}/")
    choose = "const it = document.querySelector('[name=outcome]'); it.value = 'faulted'"
    browser.evaluate(f"(() => {{ {choose}; it.dispatchEvent(new Event('change')); }})()")
    browser.wait_for_load()
    assert browser.evaluate("location.search") == "?outcome=faulted"
    browser.evaluate("document.querySelector('.name').click()")
    browser.wait_for_load()
    assert browser.evaluate("location.pathname") == "/episode/eval/paint.0"
    assert "the screen went black" in browser.evaluate("document.body.innerText")
    assert browser.complaints == []


def test_a_group_stands_side_by_side_with_the_success_that_mended_it(viewer: Viewer, browser: Browser) -> None:
    browser.open(f"{viewer.url}/group/train/1")
    assert browser.evaluate("document.querySelectorAll('.rows .strip').length") == 2
    text = browser.evaluate("document.body.innerText")
    assert "learnt from, batch train/000002" in text
    assert "made room for a stored success" in text and "It took a failed member's place" in text
    assert browser.evaluate("document.querySelector('section .strip a').pathname") == "/episode/train/0.0"
    assert "not learnt from: faults" not in text


def test_what_the_policy_wrote_does_nothing(viewer: Viewer, browser: Browser) -> None:
    browser.open(f"{viewer.url}/episode/train/0.1?step=1")
    assert browser.evaluate("document.title").startswith("train/0.1")
    assert EVIL in browser.evaluate("document.querySelector('.thought').textContent")
    assert browser.complaints == []


def test_it_shows_what_is_played_meanwhile(viewer: Viewer, replay: ReplayProcess, browser: Browser) -> None:
    client = replay.client()
    client.plan("live/0", task_id="live", num=2)
    browser.open(f"{viewer.url}/?task=live")
    assert "No episode matches" in browser.evaluate("document.body.innerText")
    running = client.acquire()
    shown = OpenStream(client)
    shown.send(begin(running), *turn(0, "Action: wait()", {"kind": "wait"}, version=4))
    shown.read_until(1)
    assert viewer.names("/?task=live&outcome=running") == [running.rollout.episode_id]
    assert "wait()" in viewer.get(f"/episode/{running.rollout.episode_id}?step=1")
    ended = play(client, 1.0, version=4)
    assert viewer.names("/?task=live") == [ended]
    note = "document.querySelector('.fresh').textContent"
    waiting = f"while (!{note}) await new Promise(done => setTimeout(done, 50))"
    assert browser.evaluate(f"(async () => {{ {waiting}; return {note}; }})()").startswith("1 more")
    shown.break_off()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/episode/train/9.9", 404),
        ("/episode/train/0.0?step=7", 404),
        ("/episode/train/0.0?step=0", 404),
        ("/group/nothing", 404),
        ("/image/12ab", 404),
        (f"/image/{'0' * 64}", 404),
        ("/?version=-1", 404),
        (f"/?before={10**30}", 404),
        ("/?outcome=lucky", 404),
        ("/../../etc/passwd", 404),
        ("/pulse", 200),
        ("/style.css", 200),
    ],
)
def test_an_address_that_names_nothing_is_answered_so(viewer: Viewer, path: str, status: int) -> None:
    assert viewer.status(path) == status


def test_a_page_on_the_web_cannot_read_it_under_a_name_of_its_own(viewer: Viewer) -> None:
    assert viewer.status("/", Host="evil.example:80") == 421
    assert viewer.status("/", Host="localhost:1234") == 200


def test_the_benchmark_of_a_large_run_runs() -> None:
    bench = Path(__file__).parents[1] / "bench/viewer.py"
    command = [sys.executable, str(bench), "--turns", "1", "--episodes", "208"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bench"] == "viewer"


# Bad input: one line, status 2, and what is there stays as it is.


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which `deskrl view` refuses."""
    assert main(["view", *arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith("deskrl: ") and line.count("\n") == 1 and "; " in line
    return line


@pytest.fixture
def run(replay: ReplayProcess, tmp_path: Path) -> Path:
    """A copy of the run, which no service holds."""
    folder = tmp_path / "copy"
    (folder / "replay").mkdir(parents=True)
    shutil.copy(replay.config.folder / "config.json", folder)
    with closing(sqlite3.connect(replay.folder / "replay.sqlite")) as source:
        source.execute("VACUUM INTO ?", (str(folder / "replay/replay.sqlite"),))
    shutil.copytree(replay.folder / "screenshots", folder / "replay/screenshots")
    return folder


def test_a_folder_that_is_no_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "config.json: no such file" in refusal(capsys, str(tmp_path))


def test_a_run_without_a_store(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    dump_config(replay_config(tmp_path), tmp_path / "config.json")
    line = refusal(capsys, str(tmp_path))
    assert "replay.sqlite: no such file" in line and "or restore it from a copy" in line


def test_a_store_that_is_cut_short(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    path = run / "replay/replay.sqlite"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 8])
    assert "cannot be read" in refusal(capsys, str(run))
    assert path.read_bytes() == whole[: len(whole) // 8]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("user_version = 1000", "is of a newer deskrl: its layout is 1000"),
        ("user_version = 1", "is of an older deskrl: its layout is 1"),
        ("application_id = 7", "is a database of something else"),
    ],
)
def test_a_store_of_another_kind(capsys: pytest.CaptureFixture[str], run: Path, change: str, told: str) -> None:
    with closing(sqlite3.connect(run / "replay/replay.sqlite")) as database:
        database.execute(f"PRAGMA {change}")
    assert told in refusal(capsys, str(run))


def test_screenshots_that_are_cut_short_or_missing(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    (path,) = (run / "replay/screenshots").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert f"{path} was cut short at {len(whole) - 1} of {len(whole)} bytes; restore" in refusal(capsys, str(run))
    assert path.read_bytes() == whole[:-1]
    path.unlink()
    assert f"{path} is missing; restore" in refusal(capsys, str(run))


def test_a_tokenizer_that_is_damaged(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    config = json.loads((run / "config.json").read_text()) | {"model": {"path": str(run / "model")}}
    (run / "config.json").write_text(json.dumps(config))
    (run / "model").mkdir()
    (run / "model/tokenizer.json").write_text("{")
    assert f"{run / 'model/tokenizer.json'} cannot be read: " in refusal(capsys, str(run))


def test_what_breaks_while_it_is_looked_at_is_told_on_the_page(run: Path) -> None:
    (path,) = (run / "replay/screenshots").iterdir()
    viewer = Viewer(run)
    try:
        name = re.findall(r'"(/image/\w+)"', viewer.get("/episode/train/0.0"))[0]
        small = f"{name}?width=160"
        assert [viewer.status(small), viewer.status(name)] == [200, 200]
        whole = path.read_bytes()
        path.write_bytes(bytes(len(whole)))
        assert [viewer.status(small), viewer.status(name)] == [500, 500]
        path.unlink()
        path.mkdir()
        assert [viewer.status(small), viewer.status(name), viewer.status("/")] == [500, 500, 200]
        (run / "replay/replay.sqlite").unlink()
        assert viewer.status("/") == 500
    finally:
        assert viewer.close() == 0


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str], viewer: Viewer, run: Path) -> None:
    port = viewer.url.rpartition(":")[2]
    assert "choose another one with --port" in refusal(capsys, str(run), "--port", port)
    assert "choose another one with --port" in refusal(capsys, str(run), "--port", "70000")
