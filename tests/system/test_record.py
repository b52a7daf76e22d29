"""`deskrl record`: a person plays a task of an embedded desktop in Chromium, and the demonstration is saved."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from browser_kit import Browser
from grpc_health.v1 import health, health_pb2_grpc
from PIL import Image

from deskrl.actor.demonstrations import Player, read_demonstration, read_screenshot
from deskrl.cli.main import main
from deskrl.proto.v1 import inference_pb2, inference_pb2_grpc

TIMEOUT_S = 60
TASK = "make-a-folder"
SIMULATED = ("type-amber", "--desktop.provider", "simulated", "--desktop.simulated.time_scale", "1e-6")


class Recorder:
    """Process of `deskrl record`."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "deskrl.cli.main", "record", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        found = re.search(r"http://(127\.0\.0\.1:\d+)/\?token=(\S+)", self.process.stdout.readline())
        assert found is not None, self.process.communicate(timeout=TIMEOUT_S)
        self.url, self.host, self.token = found[0], found[1], found[2]

    def request(self, method: str, path: str, headers: dict[str, str], body: str | None = None) -> int:
        """Return the HTTP status of a request."""
        connection = http.client.HTTPConnection(self.host, timeout=TIMEOUT_S)
        try:
            connection.request(method, path, body, headers)
            return connection.getresponse().status
        finally:
            connection.close()

    def state(self) -> dict[str, Any]:
        """Return the present state of the recording."""
        connection = http.client.HTTPConnection(self.host, timeout=TIMEOUT_S)
        try:
            connection.request("GET", "/state", headers={"X-Deskrl-Token": self.token})
            state: dict[str, Any] = json.load(connection.getresponse())
            return state
        finally:
            connection.close()

    def end(self) -> tuple[int, str]:
        """Wait for the end of the process; returns its exit status and its remaining output."""
        output, errors = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, output + errors


class Policy:
    """Chat completions server whose policy types the word of the task, then waits, and then ends the episode."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.may_answer = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                is_first = len(outer.requests) == 1
                if not is_first:
                    outer.may_answer.wait(TIMEOUT_S)
                action = "type(content='amber')" if is_first else "finished()"
                message = {"role": "assistant", "content": f"Thought: I write it.\nAction: {action}"}
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(OSError):  # the person has taken over
                    self.wfile.write(json.dumps({"choices": [{"message": message}]}).encode())

            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps({"data": [{"id": "any"}]}).encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.may_answer.set()
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def policy() -> Iterator[Policy]:
    policy = Policy()
    yield policy
    policy.close()


@pytest.fixture(scope="module", autouse=True)
def need_programs() -> None:
    for program in ("Xvfb", "bwrap", "xterm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (deploy/install.sh installs it)")


@pytest.fixture
def start() -> Iterator[Callable[..., Recorder]]:
    """Return a function that starts a recording, which is killed if the test fails before its end."""
    recorders: list[Recorder] = []

    def start(*arguments: str) -> Recorder:
        recorders.append(Recorder(*arguments))
        return recorders[-1]

    yield start
    for recorder in recorders:
        recorder.process.kill()
        recorder.process.communicate()


@pytest.fixture
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


def wait_for(browser: Browser, condition: str) -> None:
    """Wait until a JavaScript condition is true in the page."""
    browser.evaluate(
        f"new Promise((done) => {{ const look = () => ({condition}) ? done() : setTimeout(look, 20); look(); }})"
    )


def on_screen(browser: Browser, x: float, y: float) -> tuple[float, float]:
    """Return where a point of the desktop (1280 x 720 pixels) is in the window of the page."""
    left, top, width, height = browser.evaluate(
        "(({left, top, width, height}) => [left, top, width, height])(picture.getBoundingClientRect())"
    )
    return left + (x + 0.5) * width / 1280, top + (y + 0.5) * height / 720


def test_a_person_solves_a_task_in_the_browser(
    tmp_path: Path, browser: Browser, start: Callable[..., Recorder]
) -> None:
    folder = tmp_path / "demonstration"
    recorder = start(TASK, "--out", str(folder), "--seed", "7")
    browser.open(recorder.url)
    wait_for(browser, "state.phase === 'playing' && picture.naturalWidth === 1280")
    assert browser.evaluate("document.getElementById('instruction').textContent").startswith("Make a folder")
    browser.click(*on_screen(browser, 640, 360))
    wait_for(browser, "state.steps.length === 1 && !state.is_acting")
    browser.type_text("mkdir amber ")
    browser.compose("´", "é")
    browser.compose("漢😀")
    browser.press("Backspace")
    browser.press("Enter")
    wait_for(browser, "state.steps.length === 2 && !state.is_acting")
    browser.evaluate("document.getElementById('finished').click()")
    wait_for(browser, "!document.getElementById('result').hidden")
    assert browser.evaluate("document.getElementById('reward').textContent") == "Reward 1"
    assert browser.page_errors == []
    status, output = recorder.end()
    assert (status, output) == (0, f"saved 3 steps with the reward 1 (finished) in {folder}\n")

    demonstration = read_demonstration(folder)
    records = [step.action.to_record() for step in demonstration.steps]
    assert records == [
        {"kind": "click", "x": 640, "y": 360},
        {"kind": "type", "text": "mkdir amber é漢\n"},
        {"kind": "finished"},
    ]
    assert {step.player for step in demonstration.steps} == {Player.PERSON}
    assert (demonstration.task_id, demonstration.seed, demonstration.reward) == (TASK, 7, 1.0)
    assert demonstration.task["id"] == TASK
    pictures = [read_screenshot(folder, demonstration, step.screenshot) for step in demonstration.steps]
    assert pictures[2] != pictures[1], "the screenshot before the last action shows the typed command"
    assert Image.open(io.BytesIO(pictures[0])).size == demonstration.screen_size == (1280, 720)


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    """Recording of a simulated desktop, which is stopped at the end."""
    recorder = Recorder(*SIMULATED, "--out", str(tmp_path_factory.mktemp("recording") / "out"))
    yield recorder
    recorder.process.terminate()
    status, output = recorder.end()
    assert (status, output.partition(":")[0]) == (1, "nothing was saved, because no step was played")


@pytest.mark.parametrize(
    ("method", "path", "changed", "expected"),
    [
        ("GET", "/state", {}, 200),
        ("GET", "/state", {"X-Deskrl-Token": None}, 403),
        ("GET", "/state", {"X-Deskrl-Token": "guessed"}, 403),
        ("GET", "/state", {"Host": "evil.example"}, 400),
        ("GET", "/", {"X-Deskrl-Token": None}, 403),
        ("GET", "/screen/1", {"X-Deskrl-Token": None}, 403),
        ("POST", "/take_over", {}, 204),
        ("POST", "/take_over", {"Origin": "http://{host}"}, 204),
        ("POST", "/take_over", {"Origin": "http://evil.example"}, 403),
        ("POST", "/take_over", {"Origin": "null"}, 403),
        ("POST", "/take_over", {"Host": "evil.example"}, 400),
        ("POST", "/take_over?token={token}", {"X-Deskrl-Token": None}, 403),
        ("GET", "/take_over", {}, 405),
        ("POST", "/action", {"X-Deskrl-Token": None}, 403),
        ("POST", "/discard", {"Origin": "http://evil.example"}, 403),
    ],
)
def test_only_the_page_itself_can_see_and_control_the_desktop(
    recorder: Recorder, method: str, path: str, changed: dict[str, str | None], expected: int
) -> None:
    names = {"host": recorder.host, "token": recorder.token}
    headers = {"X-Deskrl-Token": recorder.token, **changed}
    sent = {name: value.format(**names) for name, value in headers.items() if value is not None}
    assert recorder.request(method, path.format(**names), sent) == expected


def test_an_action_that_cannot_be_executed_is_refused(recorder: Recorder) -> None:
    headers = {"X-Deskrl-Token": recorder.token}
    assert recorder.request("POST", "/action", headers, json.dumps({"kind": "click", "x": 99999})) == 422
    assert recorder.request("POST", "/action", headers, json.dumps({"kind": "type", "text": "x" * 200_000})) == 413
    assert recorder.state()["steps"] == []


def test_the_person_watches_the_policy_takes_over_and_hands_back(
    tmp_path: Path, browser: Browser, policy: Policy, start: Callable[..., Recorder]
) -> None:
    recorder = start(
        *SIMULATED, "--out", str(tmp_path / "out"), "--policy", policy.url, "--inference.external_model", "any"
    )
    browser.open(recorder.url)
    wait_for(browser, "state.phase === 'playing' && picture.naturalWidth === 1280")
    browser.click(*on_screen(browser, 320, 180))
    wait_for(browser, "state.steps.length === 1 && !state.is_acting")
    button = "document.getElementById('{}').click()"
    browser.evaluate(button.format("hand_over"))
    wait_for(browser, "state.steps.length === 2")
    assert browser.evaluate("state.player") == "policy"
    browser.evaluate(button.format("take_over"))
    wait_for(browser, "state.player === 'person'")
    policy.may_answer.set()
    browser.click(*on_screen(browser, 640, 360))
    wait_for(browser, "state.steps.length === 3 && !state.is_acting")
    browser.evaluate(button.format("hand_over"))
    wait_for(browser, "state.player === 'person' && state.message")
    assert browser.evaluate("document.getElementById('message').textContent").endswith("end the episode: finished")
    browser.evaluate(button.format("finished"))
    wait_for(browser, "state.phase === 'ended'")
    assert recorder.end()[0] == 0
    demonstration = read_demonstration(tmp_path / "out")
    played = [(step.player, str(step.action.kind), step.thought) for step in demonstration.steps]
    assert played == [
        (Player.PERSON, "click", ""),
        (Player.POLICY, "type", "I write it."),
        (Player.PERSON, "click", ""),
        (Player.PERSON, "finished", ""),
    ]
    assert demonstration.reward == 1.0
    said = [message["content"] for message in policy.requests[-1]["messages"] if message["role"] == "assistant"]
    assert len(said) == 3 and "click(" in said[2][0]["text"], "the policy sees what the person did"


class Replica(inference_pb2_grpc.InferenceServiceServicer):
    """Inference replica whose policy types the word of the task. It rejects requests with unknown screenshots."""

    def __init__(self) -> None:
        self._images: set[str] = set()

    def Act(self, request: inference_pb2.ActRequest, context: Any) -> inference_pb2.ActResponse:
        self._images |= {image.hash for image in request.images}
        named = {content.image_hash for message in request.messages for content in message.contents} - {""}
        assert named <= self._images
        text = "Thought: I write it.\nAction: type(content='amber')"
        ids = list(text.encode())
        return inference_pb2.ActResponse(
            action=inference_pb2.SampledAction(
                prompt_ids=[1], action_ids=ids, logprobs=[-0.5] * len(ids), text=text, processor_hash="-", stopped=True
            )
        )


def test_the_policy_of_a_replica_can_play(tmp_path: Path, browser: Browser, start: Callable[..., Recorder]) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Replica(), server)
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    recorder = start(*SIMULATED, "--out", str(tmp_path / "out"), "--policy", f"127.0.0.1:{port}")
    browser.open(recorder.url)
    wait_for(browser, "state.phase === 'playing' && picture.naturalWidth === 1280")
    browser.click(*on_screen(browser, 320, 180))
    wait_for(browser, "state.steps.length === 1 && !state.is_acting")
    browser.evaluate("document.getElementById('hand_over').click()")
    wait_for(browser, "state.phase === 'ended' || state.message")
    assert browser.evaluate("state.message") == ""
    assert recorder.end()[0] == 0
    server.stop(None)
    demonstration = read_demonstration(tmp_path / "out")
    assert [step.player for step in demonstration.steps[:2]] == [Player.PERSON, Player.POLICY]
    assert demonstration.termination == "step_limit" and demonstration.final_screenshot is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], r"no task fly \(hint: choose from the 32 tasks"),
        (["{tmp}/none.json"], "no task .*none.json"),
        (["{task}", "--out", "{tmp}"], "{tmp}: exists"),
        (["{task}", "--port", "{taken}"], "port {taken} is in use"),
        (["{task}", "--port", "70000"], "--port: 70000"),
        (["{task}", "--desktop.provider", "none"], "desktop.provider"),
        (["{task}", "--desktop.provider", "docker", "--desktop.docker.image", "none:none"], "docker"),
        (["{task}", "--policy", "http://127.0.0.1:1/v1"], "external_url and external_model must be set together"),
        (["{task}", "--policy", "nowhere"], "inference.address"),
        (["{task}", "--policy", "127.0.0.1:1"], "127.0.0.1:1: no replica answers"),
        (
            ["{task}", "--policy", "http://127.0.0.1:1/v1", "--inference.external_model", "any"],
            "http://127.0.0.1:1/v1/models: ",
        ),
        (["{task}", "--config", "{tmp}/none.toml"], "none.toml"),
    ],
)
def test_bad_input_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"tmp": tmp_path, "task": TASK, "taken": taken.getsockname()[1]}
        given = [argument.format(**names) for argument in arguments]
        assert main(["record", *given] if "--out" in given else ["record", *given, "--out", f"{tmp_path}/new"]) == 2
    line = capsys.readouterr().err
    assert re.search(message.format(**names), line) and line.count("\n") == 1, line
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
