"""Run report over a replay store with synthetic episodes, while the replay service is running.

It specifies the contents of the page, that the page is self-contained, and that text of the policy stays text.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from ports_kit import free_address

from deskrl.analysis.report.report_page import write_report
from deskrl.cli.main import main
from deskrl.core import ids, rpc
from deskrl.core.config import ReplayConfig, RunConfig, dump_config
from deskrl.core.file_io import write_json
from deskrl.core.run_dir import RunDir
from deskrl.core.step_codec import Step, VersionSpan, encode_step
from deskrl.proto.v1 import common_pb2, replay_pb2, replay_pb2_grpc, rollout_pb2, rollout_pb2_grpc

EVIL = "</code><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>{{ 7*7 }}"
PEER = rpc.peer("actor", "synthetic")
MAX_PAGE_BYTES = 5_000_000


@dataclass
class SyntheticEpisode:
    """One episode: texts and actions of the policy, and the result or fault."""

    steps: list[tuple[str, dict[str, Any]]]
    reward: float = 0.0
    version: int = 0
    termination: rollout_pb2.Termination = rollout_pb2.TERMINATION_FINISHED
    evidence: str = ""
    screens: list[bytes] = field(default_factory=list)
    fault: rollout_pb2.EpisodeFault | None = None


def screen(text: str, size: tuple[int, int] = (504, 280)) -> bytes:
    """Return an image with a word on it, as PNG."""
    picture = Image.new("RGB", size, "#dfe3e8")
    ImageDraw.Draw(picture).text((20, 20), text, fill="black")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


class ReplayProcess:
    """A replay service process."""

    def __init__(self, config: RunConfig) -> None:
        self.address = config.replay.address
        command = [sys.executable, "-m", "deskrl.cli.main", "replay", str(config.run_dir / "config.json")]
        self._process = subprocess.Popen(command, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        deadline = time.monotonic() + 30
        while not rpc.is_healthy(self.address, timeout_s=0.5):
            assert self._process.poll() is None and time.monotonic() < deadline, "replay did not start"

    def run_group(self, queue: str, task_id: str, episodes: list[SyntheticEpisode]) -> None:
        """Plan one group and send the episodes of its members in order."""
        asyncio.run(self._run_group(queue, task_id, episodes))

    async def _run_group(self, queue: str, task_id: str, episodes: list[SyntheticEpisode]) -> None:
        async with rpc.connect(self.address) as channel:
            replay, rollout = replay_pb2_grpc.ReplayServiceStub(channel), rollout_pb2_grpc.RolloutServiceStub(channel)
            plan = replay_pb2.GroupPlan(
                group_id=ids.new_id(queue),
                queue=queue,
                task_id=task_id,
                task_json=b"{}",
                seeds=range(len(episodes)),
                max_steps=10,
                temperature=1.0,
                acting_policy=rollout_pb2.ACTING_POLICY_SCRIPTED
                if queue == "demo"
                else rollout_pb2.ACTING_POLICY_SAMPLED,
            )
            await replay.PlanGroups(replay_pb2.PlanGroupsRequest(peer=rpc.peer("learner", "test"), groups=[plan]))
            for episode in episodes:
                ask = rollout_pb2.AcquireLeaseRequest(peer=PEER, request_id=ids.new_id("ask"), wait_s=5)
                lease = await rollout.AcquireLease(ask, timeout=60)
                assert lease.lease_id, "no lease was granted"
                call = rollout.StreamEpisode(iter(list(_events(lease, episode))), timeout=60)
                assert [answer async for answer in call][-1].closed

    def stop(self) -> None:
        """Terminate the service; once is enough."""
        self._process.terminate()
        assert self._process.wait(20) == 0


def _events(
    lease: rollout_pb2.AcquireLeaseResponse, episode: SyntheticEpisode
) -> Iterator[rollout_pb2.StreamEpisodeRequest]:
    request = rollout_pb2.StreamEpisodeRequest
    begin = rollout_pb2.EpisodeBegin(peer=PEER, lease_id=lease.lease_id, episode_id=lease.rollout.episode_id)
    yield request(begin=begin)
    screens = episode.screens or [screen(f"{lease.rollout.task_id} {n}") for n in range(len(episode.steps) + 1)]
    images = [common_pb2.Image(hash=ids.image_hash(data), data=data) for data in screens]
    for index, (text, action) in enumerate(episode.steps):
        step = Step(
            index=index,
            screenshot=images[index].hash,
            images=(images[index].hash,),
            text=text,
            action=action,
            spans=(VersionSpan("main", episode.version, 0, 1),),
            action_ids=(1,),
            logprobs=(-0.1,),
        )
        record = rollout_pb2.EpisodeStep(index=index, image_hashes=step.images, payload=encode_step(step))
        yield request(step=record, images=images[index : index + 1])
    if episode.fault is not None:
        yield request(fault=episode.fault)
        return
    yield request(
        result=rollout_pb2.EpisodeResult(
            reward=episode.reward,
            format_ok=episode.termination != rollout_pb2.TERMINATION_FORMAT_ERROR,
            termination=episode.termination,
            num_steps=len(episode.steps),
            evidence_json=episode.evidence,
            final_image_hash=images[-1].hash,
            duration_s=1.5 * len(episode.steps),
        ),
        images=images[-1:],
    )


def make_run(root: Path, **settings: Any) -> tuple[RunDir, RunConfig]:
    config = RunConfig(
        name="synthetic", runs=root, replay=ReplayConfig(address=free_address(), max_faults=0), **settings
    )
    folder = RunDir(config.run_dir)
    folder.create()
    dump_config(config, folder.config)
    return folder, config


def click(x: int, y: int) -> dict[str, Any]:
    return {"kind": "click", "x": x, "y": y}


class Page(HTMLParser):
    """Parsed page: text outside of styles and scripts, tags, addresses and event handlers."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self._silent = ""
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._silent = tag if tag in ("style", "script", "pre") else ""
        self.links += [
            value or "" for name, value in attrs if name in ("href", "src", "srcset", "action", "xlink:href")
        ]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        self._silent = ""

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.words.append(data)


def write_metrics(folder: RunDir, num_updates: int = 6) -> None:
    def per_task(n: int, rate: float) -> dict[str, dict[str, int]]:
        return {"note": {"n": n, "success": round(n * rate)}, "paint": {"n": n, "success": round(n * rate / 2)}}

    # Explicit times, so that phases have a duration.
    folder.append_metrics("phase", unix_s=1_000.0, phase="imitation")
    for update in range(1, 4):
        folder.append_metrics(
            "imitation", unix_s=1_010.0 + update, update=update, loss=2.0 / update, likelihood=0.1 * update
        )
    folder.append_metrics("eval", unix_s=1_050.0, when="before", episodes=96, successes=36, per_task=per_task(48, 0.5))
    folder.append_metrics("phase", unix_s=1_060.0, phase="training")
    for update in range(1, num_updates + 1):
        rate = 0.3 + 0.1 * update
        folder.append_metrics(
            "update",
            unix_s=1_060.0 + 20 * update,
            update=update,
            loss=-0.01 * update,
            success_rate=rate,
            gradient_norm=float("nan") if update == 3 else 1.5,
            entropy=1 / update,
            staleness_mean=0.5,
            staleness_max=2,
            mismatch_mean=1e-7 * update,
            mismatch_max=3e-6,
            dropped={"all_failed": 1},
            replayed=1,
            per_task=per_task(8, rate),
            seconds={"wait": 2.5, "learn": 0.5},
        )
    folder.append_metrics("eval", unix_s=1_190.0, when="after", episodes=96, successes=77, per_task=per_task(48, 0.95))
    folder.append_metrics("phase", unix_s=1_200.0, phase="finished")


@pytest.fixture
def replay_of() -> Iterator[Any]:
    started: list[ReplayProcess] = []

    def start(config: RunConfig) -> ReplayProcess:
        started.append(ReplayProcess(config))
        return started[-1]

    yield start
    for process in started:
        process.stop()


def test_the_page_shows_results_curves_times_faults_and_example_episodes(tmp_path: Path, replay_of: Any) -> None:
    folder, config = make_run(tmp_path, seed=7)
    replay = replay_of(config)
    say = "Thought: I press Save.\nAction: click(start_box='(10,10)')"
    replay.run_group(
        "eval/before",
        "note",
        [SyntheticEpisode([(say, click(700, 300))] * 3, version=2, evidence='{"found": "no file"}')],
    )
    done = [(say, click(64, 36)), ("Thought: Done.\nAction: finished()", {"kind": "finished"})]
    replay.run_group("eval/after", "note", [SyntheticEpisode(done, reward=1.0, version=41)])
    gone = rollout_pb2.EpisodeFault(kind=rollout_pb2.FAULT_KIND_DESKTOP_LOST, message="gone")
    replay.run_group("eval/after", "paint", [SyntheticEpisode([], fault=gone), SyntheticEpisode(done[:1], reward=0.0)])
    write_metrics(folder)
    write_json(folder.tasks, {"note": {"instruction": "Save the note."}})
    write_json(
        folder.results / "acceptance.json",
        [
            {"criterion": "it finishes", "ok": True, "value": "finished, 0 restarts", "how": "no role crashed"},
            {"criterion": "it improves", "ok": False, "value": "+12 points", "how": "fresh episodes"},
        ],
    )

    path = write_report(folder, config)

    assert path == folder.report
    html = path.read_text(encoding="utf-8")
    text = Page(html).text
    assert "seed 7" in text
    assert "1 of 2 acceptance criteria met" in text
    assert "38% → 80%" in text  # 36 and 77 of 96
    assert "+43 points 95 % interval +29 to +54" in text
    assert "Save the note." in text
    assert "failed version 2" in text and "solved version 41" in text
    assert "no file" in text
    assert "desktop lost 1" in text
    assert "No episode solved." in text
    assert "imitation 1 min 00 s 30%" in text and "training 2 min 20 s 70%" in text
    assert "wait 2.50 s" in text
    # The click is drawn in pixels of the screen, not of the smaller screenshot.
    assert f'viewBox="0 0 {config.desktop.width} {config.desktop.height}"' in html
    assert '<circle class="mark" cx="700.0" cy="300.0"' in html


def make_evaluation(root: Path, num_repeats: int = 2) -> tuple[RunDir, RunConfig]:
    """Write the directory of an evaluation of two task sets, `held_out` and `held_out-noisy`, without results."""
    folder, config = make_run(root)
    tasks = {name: {"instruction": f"Do {name}.", "evaluator": {"func": "check"}} for name in ("note", "paint", EVIL)}
    manifest = {"plan": {"repeats": num_repeats, "temperature": 0.6}, "sets": {"held_out": {}, "held_out-noisy": {}}}
    write_json(folder.root / "evaluation.json", manifest)
    for name in ("held_out", "held_out-noisy"):
        part = RunDir(folder.root / "sets" / name)
        part.create()
        dump_config(config, part.config)
        part.write_tasks(tasks, dict.fromkeys(tasks, "os"), [])
    write_json(part.left_out, {"film": ["application vlc is not installed"], "mail": ["account required: mail"]})
    return folder, config


def test_an_evaluation_has_a_page_of_its_own_in_which_everything_is_counted(
    tmp_path: Path, replay_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = make_evaluation(tmp_path)
    replay = replay_of(config)
    solved = SyntheticEpisode([("Action: x", click(9, 9))], reward=1.0)
    failed = SyntheticEpisode([(EVIL, click(5, 5))])
    gone = SyntheticEpisode([], fault=rollout_pb2.EpisodeFault(kind=rollout_pb2.FAULT_KIND_DESKTOP_LOST, message="x"))
    for queue, tasks in (
        ("eval/held_out", {"note": [solved, solved], "paint": [solved, failed], EVIL: [failed, failed]}),
        ("eval/held_out-noisy", {"note": [failed, gone]}),
    ):
        for task, episodes in tasks.items():
            replay.run_group(queue, task, episodes)

    assert main(["report", str(folder.root)]) == 0

    assert capsys.readouterr().out.strip() == str(folder.report)
    page = Page(folder.report.read_text(encoding="utf-8"))
    assert "deskrl evaluation" in page.text and "Cut short" not in page.text and "updates" not in page.text
    assert "50% success on held_out, 3 of 6 episodes; 95 % interval" in page.text
    assert "Not finished. 4 of 12 episodes have not ended." in page.text
    assert "4 of 8 listed tasks evaluated; 2 left out, 1 episodes not counted" in page.text
    assert "2 67%" in page.text, "pass@2: two of three tasks are solved by at least one of two episodes"
    assert "application vlc is not installed 1" in page.text and "planned episodes 6" in page.text
    assert "Do note. note" in page.text
    assert page.tags.count("script") == 1 and "img" not in page.tags and not page.handlers
    assert all(link.startswith(("#i-", "data:image/")) for link in page.links), page.links
    assert main(["report", str(folder.root / "sets" / "held_out")]) == 0
    alone = Page((folder.root / "sets" / "held_out" / "report.html").read_text(encoding="utf-8"))
    assert "synthetic/held_out" in alone.text and "67% pass@2" in alone.text


def test_a_run_is_not_reproduced_from_an_evaluation_or_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = make_evaluation(tmp_path)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    for root, reason in (
        (folder.root, "is an evaluation, which has no updates: nothing can be reproduced"),
        (folder.root / "sets" / "held_out", "is an evaluation, which has no updates"),
        (tmp_path / "sweep", "is a sweep: nothing can be reproduced"),
        (tmp_path, "contains no run"),
        (tmp_path / "gone", "not found"),
    ):
        assert main(["reproduce", str(root)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"deskrl: {root}: {reason}") and error.count("\n") == 1


def test_the_page_is_self_contained_and_text_of_the_policy_stays_text(tmp_path: Path, replay_of: Any) -> None:
    folder, config = make_run(tmp_path)
    replay = replay_of(config)
    steps = [(f"Thought: {EVIL}\nAction: {EVIL}", {"kind": "type", "text": EVIL}), (EVIL, {})]
    episodes = [
        SyntheticEpisode(steps, termination=rollout_pb2.TERMINATION_FORMAT_ERROR, evidence=json.dumps({"seen": EVIL})),
        SyntheticEpisode([("", {"kind": EVIL, "x": EVIL, "y": float("nan"), "keys": EVIL})], reward=1.0),
    ]
    replay.run_group("eval/before", EVIL, episodes)
    folder.append_metrics("update", update=1, loss=0.5, per_task={EVIL: {"n": 2, "success": 1}}, dropped={EVIL: 1})
    folder.append_metrics("phase", phase=EVIL)

    html = write_report(folder, config).read_text(encoding="utf-8")

    page = Page(html)
    assert "{{ 7*7 }}" in page.text
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert not page.handlers
    assert all(link.startswith(("#i-", "data:image/")) for link in page.links), page.links
    assert "default-src 'none'" in html


def test_a_browser_opens_the_page_without_errors(tmp_path: Path, replay_of: Any) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed")
    folder, config = make_run(tmp_path)
    replay = replay_of(config)
    replay.run_group(
        "eval/before",
        "note",
        [SyntheticEpisode([(EVIL, click(9, 9))]), SyntheticEpisode([("Action: x", click(5, 5))], 1.0)],
    )
    write_metrics(folder)
    page = write_report(folder, config)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=1000"]

    opened = subprocess.run([browser, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60)

    assert "synthetic" in opened.stdout
    assert "CONSOLE" not in opened.stderr, "a script failed, or the Content-Security-Policy was violated"


def test_large_screenshots_are_scaled_to_limit_the_size_of_the_page(tmp_path: Path, replay_of: Any) -> None:
    folder, config = make_run(tmp_path)
    replay = replay_of(config)
    say = "Thought: on\nAction: wait()"
    for task in range(4):
        noise = [_noisy(seed) for seed in range(task * 11, task * 11 + 11)]
        for reward in (0.0, 1.0):
            replay.run_group(
                "train-like", f"task-{task}", [SyntheticEpisode([(say, {"kind": "wait"})] * 10, reward, screens=noise)]
            )

    html = write_report(folder, config).read_text(encoding="utf-8")

    assert len(html.encode()) < MAX_PAGE_BYTES
    assert len(re.findall(r'<image id="i-', html)) == 44, "each screenshot must be stored once"
    assert all(width <= 640 for width in _image_widths(html))


def test_a_run_without_records_has_a_page(tmp_path: Path, replay_of: Any) -> None:
    folder, config = make_run(tmp_path)
    replay_of(config)
    text = Page(write_report(folder, config).read_text(encoding="utf-8")).text
    assert "Not finished." in text and "Incomplete" not in text
    assert "No episodes." in text


def test_a_damaged_run_directory_without_a_replay_store_has_a_page_that_names_the_store(tmp_path: Path) -> None:
    folder, config = make_run(tmp_path)
    folder.append_metrics("update", update=1)
    folder.append_metrics("update", update=2, loss=None, per_task={"note": 3, "paint": {"n": "?"}}, seconds=4)
    folder.append_metrics("update", loss=1.0)
    folder.append_metrics("eval", when="after")
    folder.append_metrics("phase")
    with folder.metrics.open("a") as file:
        file.write('[1, 2]\n"text"\n{"kind": "update", "upd')
    folder.acceptance.write_text("{ torn")

    text = Page(write_report(folder, config).read_text(encoding="utf-8")).text

    assert "2 of 100 updates are recorded" in text
    assert f"Incomplete: {folder.replay / 'replay.sqlite'}: not found" in text


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: os.truncate(path, path.stat().st_size // 8), "cannot be read"),
        (lambda path: _set_pragma(path, "user_version = 1000"), "1000"),
        (lambda path: _set_pragma(path, "application_id = 7"), str(Path("replay.sqlite"))),
    ],
    ids=["truncated", "newer version", "other application"],
)
def test_a_damaged_or_foreign_store_is_named_on_the_page_and_left_unchanged(
    tmp_path: Path, replay_of: Any, damage: Callable[[Path], None], problem: str
) -> None:
    folder, config = make_run(tmp_path)
    replay = replay_of(config)
    replay.run_group("eval/before", "note", [SyntheticEpisode([("Action: x", click(5, 5))], 1.0)])
    replay.stop()
    path = folder.replay / "replay.sqlite"
    damage(path)
    data = path.read_bytes()

    text = Page(write_report(folder, config).read_text(encoding="utf-8")).text

    assert f"Incomplete: {path}" in text and problem in text
    assert path.read_bytes() == data


def test_the_report_command_starts_no_service_and_needs_no_free_port(
    tmp_path: Path, replay_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The service of the run is in operation, so that its store is locked and its port taken."""
    folder, config = make_run(tmp_path)
    replay_of(config).run_group("eval/before", "note", [SyntheticEpisode([("Action: x", click(5, 5))], 1.0)])

    assert main(["report", str(folder.root)]) == 0

    assert capsys.readouterr().out == f"{folder.report}\n"
    assert "1 episodes" in Page(folder.report.read_text(encoding="utf-8")).text


def _set_pragma(path: Path, pragma: str) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA {pragma}")


def _noisy(seed: int) -> bytes:
    """Return a screenshot that hardly compresses and is wider than the page shows it."""
    picture = Image.effect_noise((960, 540), 40 + seed).convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _image_widths(html: str) -> list[int]:
    uris = re.findall(r"data:image/[a-z]+;base64,([A-Za-z0-9+/=]+)", html.replace("&#43;", "+"))
    return [Image.open(io.BytesIO(base64.b64decode(data))).width for data in uris]
