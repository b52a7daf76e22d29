"""The report against a real replay service that holds synthetic episodes.

What a reader finds on the page, that the page needs nothing but itself, and that nothing which the policy wrote can do
anything in it.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from ports_kit import free_address

from deskrl.core import ids, rpc
from deskrl.core.config import ReplayConfig, RunConfig, dump_config
from deskrl.core.report import write_report
from deskrl.core.runfolder import RunFolder, write_json
from deskrl.core.trajectory import Span, Step, encode_step
from deskrl.proto.v1 import common_pb2, replay_pb2, replay_pb2_grpc, rollout_pb2, rollout_pb2_grpc

EVIL = "</code><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>{{ 7*7 }}"
PEER = rpc.peer("actor", "synthetic")
MAX_PAGE_BYTES = 5_000_000


@dataclass
class Play:
    """One synthetic episode: its actions with what the policy said, and its end."""

    turns: list[tuple[str, dict[str, Any]]]
    reward: float = 0.0
    version: int = 0
    termination: rollout_pb2.Termination = rollout_pb2.TERMINATION_FINISHED
    evidence: str = ""
    screens: list[bytes] = field(default_factory=list)
    fault: rollout_pb2.EpisodeFault | None = None


def screen(text: str, size: tuple[int, int] = (504, 280)) -> bytes:
    """A picture with a word on it, as PNG."""
    picture = Image.new("RGB", size, "#dfe3e8")
    ImageDraw.Draw(picture).text((20, 20), text, fill="black")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


class ReplayProcess:
    """The real service, as `deskrl up` starts it."""

    def __init__(self, config: RunConfig) -> None:
        self.address = config.replay.address
        command = [sys.executable, "-m", "deskrl.core.cli", "replay", str(config.folder / "config.json")]
        self._process = subprocess.Popen(command, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        deadline = time.monotonic() + 30
        while not rpc.is_healthy(self.address, timeout_s=0.5):
            assert self._process.poll() is None and time.monotonic() < deadline, "replay did not start"

    def play(self, queue: str, task_id: str, plays: list[Play]) -> None:
        """Plan one group and play its members in order."""
        asyncio.run(self._play(queue, task_id, plays))

    async def _play(self, queue: str, task_id: str, plays: list[Play]) -> None:
        async with rpc.connect(self.address) as channel:
            replay, rollout = replay_pb2_grpc.ReplayServiceStub(channel), rollout_pb2_grpc.RolloutServiceStub(channel)
            plan = replay_pb2.GroupPlan(
                group_id=ids.new_id(queue),
                queue=queue,
                task_id=task_id,
                task_json=b"{}",
                seeds=range(len(plays)),
                max_steps=10,
                temperature=1.0,
                acting_policy=rollout_pb2.ACTING_POLICY_SCRIPTED
                if queue == "demo"
                else rollout_pb2.ACTING_POLICY_SAMPLED,
            )
            await replay.PlanGroups(replay_pb2.PlanGroupsRequest(peer=rpc.peer("learner", "test"), groups=[plan]))
            for play in plays:
                ask = rollout_pb2.AcquireLeaseRequest(peer=PEER, request_id=ids.new_id("ask"), wait_s=5)
                lease = await rollout.AcquireLease(ask, timeout=10)
                assert lease.lease_id, "no work was granted"
                call = rollout.StreamEpisode(iter(list(_events(lease, play))), timeout=30)
                assert [answer async for answer in call][-1].closed

    def stop(self) -> None:
        self._process.terminate()
        assert self._process.wait(20) == 0


def _events(lease: rollout_pb2.AcquireLeaseResponse, play: Play) -> Iterator[rollout_pb2.StreamEpisodeRequest]:
    request = rollout_pb2.StreamEpisodeRequest
    begin = rollout_pb2.EpisodeBegin(peer=PEER, lease_id=lease.lease_id, episode_id=lease.rollout.episode_id)
    yield request(begin=begin)
    screens = play.screens or [screen(f"{lease.rollout.task_id} {n}") for n in range(len(play.turns) + 1)]
    images = [common_pb2.Image(hash=ids.image_hash(data), data=data) for data in screens]
    for index, (text, action) in enumerate(play.turns):
        step = Step(
            index=index,
            screenshot=images[index].hash,
            images=(images[index].hash,),
            text=text,
            action=action,
            spans=(Span("main", play.version, 0, 1),),
            action_ids=(1,),
            logprobs=(-0.1,),
        )
        record = rollout_pb2.EpisodeStep(index=index, image_hashes=step.images, payload=encode_step(step))
        yield request(step=record, images=images[index : index + 1])
    if play.fault is not None:
        yield request(fault=play.fault)
        return
    yield request(
        result=rollout_pb2.EpisodeResult(
            reward=play.reward,
            format_ok=play.termination != rollout_pb2.TERMINATION_FORMAT_ERROR,
            termination=play.termination,
            num_steps=len(play.turns),
            evidence_json=play.evidence,
            final_image_hash=images[-1].hash,
            duration_s=1.5 * len(play.turns),
        ),
        images=images[-1:],
    )


def make_run(root: Path, **settings: Any) -> tuple[RunFolder, RunConfig]:
    config = RunConfig(
        name="synthetic", runs=root, replay=ReplayConfig(address=free_address(), max_faults=0), **settings
    )
    folder = RunFolder(config.folder)
    folder.create()
    dump_config(config, folder.config)
    return folder, config


def click(x: int, y: int) -> dict[str, Any]:
    return {"kind": "click", "x": x, "y": y}


class Page(HTMLParser):
    """What a browser would find: text outside of style and script, tags, addresses."""

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


def write_metrics(folder: RunFolder, num_updates: int = 6) -> None:
    def per_task(n: int, rate: float) -> dict[str, dict[str, int]]:
        return {"note": {"n": n, "success": round(n * rate)}, "paint": {"n": n, "success": round(n * rate / 2)}}

    # Times are given, so that phases have a length.
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


def test_page_tells_the_run(tmp_path: Path, replay_of: Any) -> None:
    folder, config = make_run(tmp_path, seed=7)
    replay = replay_of(config)
    say = "Thought: I press Save.\nAction: click(start_box='(10,10)')"
    replay.play("eval/before", "note", [Play([(say, click(700, 300))] * 3, version=2, evidence='{"found": "no file"}')])
    done = [(say, click(64, 36)), ("Thought: Done.\nAction: finished()", {"kind": "finished"})]
    replay.play("eval/after", "note", [Play(done, reward=1.0, version=41)])
    gone = rollout_pb2.EpisodeFault(kind=rollout_pb2.FAULT_KIND_DESKTOP_LOST, message="gone")
    replay.play("eval/after", "paint", [Play([], fault=gone), Play(done[:1], reward=0.0)])
    write_metrics(folder)
    write_json(folder.root / "tasks.json", {"note": {"instruction": "Save the note."}})
    write_json(
        folder.results / "acceptance.json",
        [
            {"criterion": "it finishes", "ok": True, "value": "finished, 0 restarts", "how": "no role crashed"},
            {"criterion": "it learns", "ok": False, "value": "+12 points", "how": "fresh episodes"},
        ],
    )

    path = write_report(folder, config, replay.address)

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
    assert "Never solved in this run." in text
    assert "imitation 1 min 00 s 30%" in text and "training 2 min 20 s 70%" in text
    assert "wait 2.50 s" in text
    # The click lies where the screen was clicked, in pixels of the screen rather than of the smaller screenshot.
    assert f'viewBox="0 0 {config.desktop.width} {config.desktop.height}"' in html
    assert '<circle class="mark" cx="700.0" cy="300.0"' in html


def test_page_needs_nothing_else_and_what_the_policy_wrote_is_only_text(tmp_path: Path, replay_of: Any) -> None:
    folder, config = make_run(tmp_path)
    replay = replay_of(config)
    turns = [(f"Thought: {EVIL}\nAction: {EVIL}", {"kind": "type", "text": EVIL}), (EVIL, {})]
    plays = [
        Play(turns, termination=rollout_pb2.TERMINATION_FORMAT_ERROR, evidence=json.dumps({"seen": EVIL})),
        Play([("", {"kind": EVIL, "x": EVIL, "y": float("nan"), "keys": EVIL})], reward=1.0),
    ]
    replay.play("eval/before", EVIL, plays)
    folder.append_metrics("update", update=1, loss=0.5, per_task={EVIL: {"n": 2, "success": 1}}, dropped={EVIL: 1})
    folder.append_metrics("phase", phase=EVIL)

    html = write_report(folder, config, replay.address).read_text(encoding="utf-8")

    page = Page(html)
    assert "{{ 7*7 }}" in page.text
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert not page.handlers
    assert all(link.startswith(("#i-", "data:image/")) for link in page.links), page.links
    assert "default-src 'none'" in html


def test_a_browser_runs_the_page_without_complaint(tmp_path: Path, replay_of: Any) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed")
    folder, config = make_run(tmp_path)
    replay = replay_of(config)
    replay.play("eval/before", "note", [Play([(EVIL, click(9, 9))]), Play([("Action: x", click(5, 5))], 1.0)])
    write_metrics(folder)
    page = write_report(folder, config, replay.address)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=1000"]

    seen = subprocess.run([browser, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60)

    assert "synthetic" in seen.stdout
    assert "CONSOLE" not in seen.stderr, "a script failed, or the page asked for what its policy forbids"


def test_large_screenshots_are_scaled_to_a_small_page(tmp_path: Path, replay_of: Any) -> None:
    folder, config = make_run(tmp_path)
    replay = replay_of(config)
    say = "Thought: on\nAction: wait()"
    for task in range(4):
        noise = [_noisy(seed) for seed in range(task * 11, task * 11 + 11)]
        for reward in (0.0, 1.0):
            replay.play("train-like", f"task-{task}", [Play([(say, {"kind": "wait"})] * 10, reward, screens=noise)])

    html = write_report(folder, config, replay.address).read_text(encoding="utf-8")

    assert len(html.encode()) < MAX_PAGE_BYTES
    assert len(re.findall(r'<image id="i-', html)) == 44, "one copy of each screenshot, however often it is shown"
    assert all(width <= 640 for width in _image_widths(html))


def test_a_run_cut_short_before_anything_was_written_gets_its_page(tmp_path: Path, replay_of: Any) -> None:
    folder, config = make_run(tmp_path)
    text = Page(write_report(folder, config, replay_of(config).address).read_text(encoding="utf-8")).text
    assert "Cut short" in text
    assert "No episodes to show." in text


def test_a_torn_run_gets_its_page_and_replay_that_is_away_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deskrl.core.report.evidence.CONNECT_TIMEOUT_S", 0.2)
    folder, config = make_run(tmp_path)
    folder.append_metrics("update", update=1)
    folder.append_metrics("update", update=2, loss=None, per_task={"note": 3, "paint": {"n": "?"}}, seconds=4)
    folder.append_metrics("update", loss=1.0)
    folder.append_metrics("eval", when="after")
    folder.append_metrics("phase")
    with folder.metrics.open("a") as file:
        file.write('[1, 2]\n"text"\n{"kind": "update", "upd')
    (folder.results / "acceptance.json").write_text("{ torn")

    text = Page(write_report(folder, config, config.replay.address).read_text(encoding="utf-8")).text

    assert "2 of 100 updates are recorded" in text
    assert f"the replay service at {config.replay.address} did not give everything" in text


def _noisy(seed: int) -> bytes:
    """A screenshot that hardly compresses, larger than a page shows it."""
    picture = Image.effect_noise((960, 540), 40 + seed).convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _image_widths(html: str) -> list[int]:
    uris = re.findall(r"data:image/[a-z]+;base64,([A-Za-z0-9+/=]+)", html.replace("&#43;", "+"))
    return [Image.open(io.BytesIO(base64.b64decode(data))).width for data in uris]
