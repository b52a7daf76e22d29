"""`deskrl view` and `deskrl watch` of a run whose replay service is running: lists, filters, pages and errors.

The store is filled over gRPC, the viewer is a separate process, and the browser is Chromium.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
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

from deskrl.cli.main import main
from deskrl.core.config import dump_config
from deskrl.core.ids import image_hash
from deskrl.core.rpc import VERSION
from deskrl.core.run_dir import RunDir
from deskrl.core.step_codec import Step, VersionSpan, encode_step
from deskrl.learner.batches.token_stats import EpisodeTokenStats, write_token_stats
from deskrl.proto.v1 import replay_pb2, rollout_pb2

EVIL = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)>{{ 7*7 }}"
CLICK = {"kind": "click", "x": 320, "y": 180}
TIMEOUT_S = 60


def picture(colour: str) -> bytes:
    """Return a screenshot as PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", (640, 360), colour).save(buffer, "PNG")
    return buffer.getvalue()


def step(index: int, text: str, action: dict[str, Any], version: int) -> Iterator[rollout_pb2.StreamEpisodeRequest]:
    """Yield the request that sends one step with its screenshot."""
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
        spans=(VersionSpan("first-line", version, 0, 2),),
        action=action,
    )
    yield rollout_pb2.StreamEpisodeRequest(
        step=rollout_pb2.EpisodeStep(index=index, image_hashes=[name], payload=encode_step(step)),
        images=[image(shot)],
    )


def run_episode(
    client: ReplayClient, reward: float, version: int, text: str = "Thought: Go.\nAction: click(1,1)"
) -> str:
    """Run the next planned rollout, a click followed by `finished`; returns its episode id."""
    lease = client.acquire()
    steps = [*step(0, text, CLICK, version), *step(1, "Action: finished()", {"kind": "finished"}, version)]
    assert client.stream([begin(lease), *steps, result(reward, 2)])[-1] == (2, True)
    return lease.rollout.episode_id


class Viewer:
    """Process of `deskrl view` or `deskrl watch`."""

    def __init__(self, folder: Path, name: str = "view") -> None:
        command = [sys.executable, "-m", "deskrl.cli.main", name, str(folder), "--port", "0"]
        environment = os.environ | {"PYTHONFAULTHANDLER": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.url = re.search(r"http://127\.0\.0\.1:\d+", line)[0]  # type: ignore[index]

    def get(self, path: str, **headers: str) -> str:
        """Return the HTML of a page."""
        request = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as page:
            text: str = page.read().decode()
        return text

    def names(self, path: str) -> list[str]:
        """Return the episode ids of a list page, in order."""
        return [unescape(name) for name in re.findall(r'class="soft">([^<]+\.\d+)</span></a>', self.get(path))]

    def status(self, path: str, **headers: str) -> int:
        """Return the HTTP status of a request."""
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=TIMEOUT_S):
                return 200
        except urllib.error.HTTPError as error:
            return error.code

    def close(self) -> int:
        """Terminate the process; returns its exit status. If it does not end, its stacks are written to stderr."""
        self.process.terminate()
        try:
            self.process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            raise
        return self.process.returncode


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplayProcess]:
    """A run with two groups of task `fold`, the second with a stored success of the first, and a group of `paint`."""
    process = ReplayProcess(replay_config(tmp_path_factory.mktemp("view"), max_faults=0))
    client = process.client()
    client.plan("train/0", task_id="fold")
    run_episode(client, 1.0, version=0)
    run_episode(client, 0.0, version=1, text=f"Thought: {EVIL}\nAction: {EVIL}")
    assert client.take("train", "train/000001", 0) is not None
    client.commit("train", "train/000001")
    scores = EpisodeTokenStats(0.5, False, logprobs=(-0.5, -2.0, -0.5, -2.25), entropies=(0.1, 1.5, 0.2, 0.3))
    write_token_stats(RunDir(process.config.run_dir), "train/000001", {"train/0": {"train/0.0": scores}}, keep=1)
    client.set_updates(1)
    client.plan("train/1", task_id="fold")
    for _ in range(2):
        run_episode(client, 0.0, version=2)
    assert client.take("train", "train/000002", 0) is not None
    client.commit("train", "train/000002", replay_pb2.GroupVerdict(group_id="train/1", used_candidate=True))
    client.plan("eval/paint", task_id="paint", num=2)
    client.stream([begin(client.acquire()), fault("the screen went black")])
    run_episode(client, 1.0, version=3)
    yield process
    process.close()


@pytest.fixture(scope="module")
def viewer(replay: ReplayProcess) -> Iterator[Viewer]:
    process = Viewer(replay.config.run_dir)
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
def test_episodes_are_listed_newest_first_and_filtered(viewer: Viewer, query: str, expected: list[str]) -> None:
    assert viewer.names(f"/?{query}") == expected


def test_a_step_shows_screenshot_action_and_sampled_tokens(viewer: Viewer, browser: Browser, tmp_path: Path) -> None:
    browser.open(f"{viewer.url}/episode/train/0.0?step=1")
    assert browser.evaluate("document.querySelector('.thought').textContent") == "Go."
    assert browser.evaluate("document.querySelector('.action').textContent") == "click(1,1)"
    circle = "document.querySelector('.large circle.mark')"
    assert browser.evaluate(f"[{circle}.cx.baseVal.value, {circle}.cy.baseVal.value]") == [320, 180]
    titles = browser.evaluate("[...document.querySelectorAll('.tokens span')].map(it => it.title)")
    assert [re.findall(r"logprob (\S+)\nversion (\d)", title) for title in titles] == [
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
    assert browser.page_errors == []


def test_tokens_show_the_learners_logprob_and_entropy_if_stored(viewer: Viewer, browser: Browser) -> None:
    browser.open(f"{viewer.url}/episode/train/0.0?step=1")
    titles = browser.evaluate("[...document.querySelectorAll('.tokens span')].map(it => it.title)")
    assert "learner's logprob -2.0000, difference +2.5e-01\nentropy 1.500 nats" in titles[1]
    assert "advantage +0.5" in browser.evaluate("document.querySelector('.head').textContent")
    heat = "getComputedStyle(document.querySelectorAll('.tokens span')[1]).getPropertyValue('--heat')"
    browser.evaluate("document.querySelector('[value=difference]').click()")
    assert float(browser.evaluate(heat)) == 0.25
    browser.open(f"{viewer.url}/episode/train/0.1?step=1")
    assert browser.evaluate("document.querySelector('[value=difference]')") is None, (
        "no token statistics are stored for this episode"
    )


def test_a_changed_filter_applies_immediately_and_a_row_links_to_its_episode(viewer: Viewer, browser: Browser) -> None:
    browser.open(f"{viewer.url}/")
    choose = "const it = document.querySelector('[name=outcome]'); it.value = 'faulted'"
    browser.evaluate(f"(() => {{ {choose}; it.dispatchEvent(new Event('change')); }})()")
    browser.wait_for_load()
    assert browser.evaluate("location.search") == "?outcome=faulted"
    browser.evaluate("document.querySelector('.name').click()")
    browser.wait_for_load()
    assert browser.evaluate("location.pathname") == "/episode/eval/paint.0"
    assert "the screen went black" in browser.evaluate("document.body.innerText")
    assert browser.page_errors == []


def test_a_group_page_shows_members_and_the_stored_success_that_replaced_one(viewer: Viewer, browser: Browser) -> None:
    browser.open(f"{viewer.url}/group/train/1")
    assert browser.evaluate("document.querySelectorAll('.rows .strip').length") == 2
    text = browser.evaluate("document.body.innerText")
    assert "used for training in batch train/000002" in text
    assert "replaced by a stored success" in text and "It replaced a failed member" in text
    assert browser.evaluate("document.querySelector('section .strip a').pathname") == "/episode/train/0.0"
    assert "dropped: faults" not in text


def test_text_of_the_policy_stays_text(viewer: Viewer, browser: Browser) -> None:
    browser.open(f"{viewer.url}/episode/train/0.1?step=1")
    assert browser.evaluate("document.title").startswith("train/0.1")
    assert EVIL in browser.evaluate("document.querySelector('.thought').textContent")
    assert browser.page_errors == []


def test_running_and_newly_ended_episodes_are_shown(viewer: Viewer, replay: ReplayProcess, browser: Browser) -> None:
    client = replay.client()
    client.plan("live/0", task_id="live", num=2)
    browser.open(f"{viewer.url}/?task=live")
    assert "No episode matches" in browser.evaluate("document.body.innerText")
    running = client.acquire()
    shown = OpenStream(client)
    shown.send(begin(running), *step(0, "Action: wait()", {"kind": "wait"}, version=4))
    shown.read_until(1)
    assert viewer.names("/?task=live&outcome=running") == [running.rollout.episode_id]
    assert "wait()" in viewer.get(f"/episode/{running.rollout.episode_id}?step=1")
    ended = run_episode(client, 1.0, version=4)
    assert viewer.names("/?task=live") == [ended]
    note = "document.querySelector('.fresh').textContent"
    wait = f"while (!{note}) await new Promise(done => setTimeout(done, 50))"
    assert browser.evaluate(f"(async () => {{ {wait}; return {note}; }})()").startswith("1 new")
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
def test_unknown_addresses_and_values_are_not_found(viewer: Viewer, path: str, status: int) -> None:
    assert viewer.status(path) == status


def test_a_request_for_another_host_name_is_rejected(viewer: Viewer) -> None:
    assert viewer.status("/", Host="evil.example:80") == 400
    assert viewer.status("/", Host="localhost:1234") == 200


def test_responses_have_security_headers_and_only_screenshots_are_cached(viewer: Viewer) -> None:
    shot = re.findall(r"/image/\w+", viewer.get("/episode/train/0.0"))[0]
    for path, caching in (("/", "no-store"), ("/viewer.js", "no-store"), (shot, "max-age=31536000, immutable")):
        request = urllib.request.Request(viewer.url + path, method="HEAD")
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            assert response.headers["Cache-Control"] == caching
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]
            assert int(response.headers["Content-Length"]) > 0 and response.read() == b""


def test_the_benchmark_runs() -> None:
    bench = Path(__file__).parents[1] / "bench/viewer.py"
    command = [sys.executable, str(bench), "--turns", "1", "--episodes", "208"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bench"] == "viewer"


# Bad input: one line, exit status 2, and all files stay unchanged.


def test_the_desktops_of_a_running_run_are_shown_live(tmp_path: Path, browser: Browser) -> None:
    with contextlib.ExitStack() as stack:
        process = ReplayProcess(replay_config(tmp_path))
        stack.callback(process.close)
        client = process.client()
        client.plan("train/0", task_id="fold", num=2)
        stream, lease = OpenStream(client), client.acquire()
        stream.send(begin(lease), *step(0, "Action: click(1,1)", CLICK, 0))
        stream.read_until(1)
        waiting = client.acquire()
        viewer = Viewer(process.config.run_dir, "watch")
        stack.callback(viewer.close)
        browser.open(f"{viewer.url}/live")
        caption = "[...document.querySelectorAll('.live .caption')].map(it => it.innerText)"
        first, second = browser.evaluate(caption)
        assert "step 1 · train" in first and "click(1,1)" in first and lease.rollout.episode_id in first
        assert waiting.rollout.episode_id in second and "step" not in second
        assert browser.evaluate("document.querySelector('.live circle.mark').cx.baseVal.value") == CLICK["x"]
        stream.send(*step(1, "Action: wait()", {"kind": "wait"}, version=0))
        shows = f"while (!({caption}[0] ?? '').includes('step 2')) await new Promise(done => setTimeout(done, 50))"
        browser.evaluate(f"(async () => {{ {shows} }})()")
        assert browser.evaluate("document.querySelector('.live img').decode().then(() => true)")
        stream.send(*step(2, "Action: finished()", {"kind": "finished"}, version=0), result(1.0, 3))
        stream.read_until(3)
        gone = f"while ({caption}.length > 1) await new Promise(done => setTimeout(done, 50))"
        browser.evaluate(f"(async () => {{ {gone} }})()")
        assert browser.page_errors == []
        process.process.kill()
        over = "while (!document.getElementById('over')) await new Promise(done => setTimeout(done, 50))"
        browser.evaluate(f"(async () => {{ {over} }})()")
        assert browser.evaluate("document.querySelectorAll('.live li').length") == 0, "the waiting episode has none"


def test_a_page_of_live_desktops_says_that_the_viewer_does_not_answer(tmp_path: Path, browser: Browser) -> None:
    process = ReplayProcess(replay_config(tmp_path))
    viewer = Viewer(process.config.run_dir, "watch")
    browser.open(f"{viewer.url}/live")
    assert browser.evaluate("stale.hidden")
    viewer.close()
    process.close()
    browser.evaluate("(async () => { while (stale.hidden) await new Promise(done => setTimeout(done, 50)) })()")


def test_a_run_that_is_not_running_has_no_live_desktops(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    assert main(["watch", str(run)]) == 2
    line = f"deskrl: {run}: is not running here: no desktop is live (hint: see its episodes: deskrl view {run})\n"
    assert capsys.readouterr().err == line
    assert main(["watch", str(run / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err


def view_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one-line error of `deskrl view`."""
    assert main(["view", *arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith("deskrl: ") and line.count("\n") == 1 and "(hint: " in line
    return line


@pytest.fixture
def run(replay: ReplayProcess, tmp_path: Path) -> Path:
    """A copy of the run whose store no service holds."""
    folder = tmp_path / "copy"
    (folder / "replay").mkdir(parents=True)
    shutil.copy(replay.config.run_dir / "config.json", folder)
    with closing(sqlite3.connect(replay.folder / "replay.sqlite")) as source:
        source.execute("VACUUM INTO ?", (str(folder / "replay/replay.sqlite"),))
    shutil.copytree(replay.folder / "screenshots", folder / "replay/screenshots")
    return folder


def test_a_folder_without_a_run_is_rejected(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "config.json: not found" in view_error(capsys, str(tmp_path))


def test_a_run_without_a_store_is_rejected(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    dump_config(replay_config(tmp_path), tmp_path / "config.json")
    line = view_error(capsys, str(tmp_path))
    assert "replay.sqlite: not found" in line and "or restore the file from a copy" in line


def test_a_truncated_store_is_rejected(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    path = run / "replay/replay.sqlite"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 8])
    assert "cannot be read" in view_error(capsys, str(run))
    assert path.read_bytes() == whole[: len(whole) // 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("user_version = 1000", f"created by a newer deskrl {VERSION} with store schema 1000"),
        ("user_version = 1", f"created by an older deskrl {VERSION} with store schema 1;"),
        ("application_id = 7", "not a replay database of deskrl"),
    ],
)
def test_a_store_of_another_version_or_application_is_rejected(
    capsys: pytest.CaptureFixture[str], run: Path, change: str, message: str
) -> None:
    with closing(sqlite3.connect(run / "replay/replay.sqlite")) as database:
        database.execute(f"PRAGMA {change}")
    assert message in view_error(capsys, str(run))


def test_truncated_or_missing_screenshots_are_rejected(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    (path,) = (run / "replay/screenshots").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert f"{path}: truncated at {len(whole) - 1} of {len(whole)} bytes (hint: restore" in view_error(capsys, str(run))
    assert path.read_bytes() == whole[:-1]
    path.unlink()
    assert f"{path}: not found (hint: restore" in view_error(capsys, str(run))


def test_a_damaged_tokenizer_is_rejected(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    config = json.loads((run / "config.json").read_text()) | {"model": {"path": str(run / "model")}}
    (run / "config.json").write_text(json.dumps(config))
    (run / "model").mkdir()
    (run / "model/tokenizer.json").write_text("{")
    assert f"{run / 'model/tokenizer.json'}: cannot be read: " in view_error(capsys, str(run))


def test_files_damaged_while_the_viewer_runs_are_errors_of_the_pages_that_need_them(run: Path) -> None:
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


def test_a_port_that_cannot_be_used_is_rejected(capsys: pytest.CaptureFixture[str], viewer: Viewer, run: Path) -> None:
    port = viewer.url.rpartition(":")[2]
    assert f"port {port} is in use" in view_error(capsys, str(run), "--port", port)
    assert "--port: 70000: " in view_error(capsys, str(run), "--port", "70000")


def test_the_page_of_a_step_shows_its_title_and_readable_evidence(tmp_path: Path, browser: Browser) -> None:
    process = ReplayProcess(replay_config(tmp_path))
    client = process.client()
    client.plan("train/0", task_id="fold", num=1)
    lease = client.acquire()
    found = json.dumps({"found": json.dumps({"name": "Größe"}), "path": '/tmp/a "b"'})
    ending = result(1.0, 12)
    ending.result.evidence_json = found
    steps = [request for index in range(12) for request in step(index, "Action: click(1,1)", CLICK, 0)]
    client.stream([begin(lease), *steps, ending])
    process.close()
    viewer = Viewer(process.config.run_dir)
    browser.open(f"{viewer.url}/episode/train/0.0?step=11")
    assert browser.evaluate("scrollY") == 0
    assert browser.evaluate("document.querySelector('h1').getBoundingClientRect().top") > 0
    assert browser.evaluate("document.querySelector('.film').scrollLeft") > 0, "the current step is in view"
    evidence = browser.evaluate("document.querySelector('.evidence').innerText")
    assert evidence.splitlines()[1:] == ['found: {"name": "Größe"}', 'path: /tmp/a "b"']
    viewer.close()


def test_tasks_whose_id_says_nothing_are_listed_by_application_and_instruction(tmp_path: Path) -> None:
    process = ReplayProcess(replay_config(tmp_path))
    client = process.client()
    opaque = "2ad9387a-65d8-4e33-ad5b-7580065a27ca"
    run_dir = RunDir(process.config.run_dir)
    instructions = {opaque: "Bookmark this page.", "fold": "Fold it."}
    tasks = {name: {"instruction": text} for name, text in instructions.items()}
    run_dir.write_tasks(tasks, {opaque: "chrome", "fold": "os"}, [])
    for number, task in enumerate(tasks):
        client.plan(f"train/{number}", task_id=task, num=1)
        run_episode(client, 1.0, version=0)
    viewer = Viewer(process.config.run_dir)
    listing = viewer.get("/")
    assert "<b>chrome: Bookmark this page.</b>" in listing and "<b>fold</b>" in listing
    assert f'<option value="{opaque}">chrome: Bookmark this page.</option>' in listing
    run_dir.tasks.write_text("{")
    assert f"<b>{opaque}</b>" in viewer.get("/"), "a damaged file leaves out the instructions"
    viewer.close()
    process.close()
