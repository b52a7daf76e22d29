"""Whatever a guest sends, the actor's memory and time are bounded, and the operation ends with a desktop's error."""

from __future__ import annotations

import asyncio
import io
import json
import os
import socketserver
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hostile_guest_kit import (
    BODY_FORMS,
    INVALID_FORMS,
    Form,
    Heartbeat,
    HostileGuest,
    MemoryPeak,
    drip,
    endless,
    hostile_guest,
    png,
    raw,
    reply,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from deskrl.actor import helper_process, image_decoding
from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops import guest_desktop, http_client, osworld_guest
from deskrl.actor.desktops.base import Address, Desktop, DesktopError, DesktopGone
from deskrl.actor.desktops.guest_desktop import GuestDesktop
from deskrl.actor.desktops.osworld_guest import OSWorldGuestDesktop
from deskrl.actor.image_decoding import ImageError, decode_image
from deskrl.actor.osworld_evaluators import evaluator_client
from deskrl.actor.osworld_evaluators.evaluator_client import OSWorldEvaluatorClient, OSWorldEvaluatorError
from deskrl.actor.task import Task
from deskrl.actor.tasks import evaluators
from deskrl.actor.tasks.evaluators import EvaluatorError, evaluate_task
from deskrl.actor.tasks.task_schema import parse_task
from deskrl.core.config import DesktopConfig

CALL_S = 0.4
"""Limit of one call on the host's side in these tests."""
ENDED_WITHIN_S = 20.0
"""Generous limit within which any call has ended, on a machine that is busy with other work."""
MAX_TURN_CPU_S = 2.0
"""Generous limit on the time for which the event loop does nothing else; 0.1 s is what an idle machine keeps."""
MIB = 1024**2
MAX_GROWTH_BYTES = 150 * MIB
"""Limit on the growth of memory by all calls at once, in which the hostile server's buffers are included."""
CONFIG = DesktopConfig(
    width=320,
    height=200,
    step_timeout_s=CALL_S,
    setup_timeout_s=CALL_S,
    evaluate_timeout_s=CALL_S,
    start_timeout_s=CALL_S,
    settle_timeout_s=0.05,
    max_file_bytes=MIB,
)


class NativeGuest(GuestDesktop):
    """Desktop whose guest server is hostile, with deskrl's native protocol."""

    def __init__(self, path: Path) -> None:
        super().__init__(CONFIG)
        self._path = path

    @property
    def address(self) -> Address:
        return self._path


class OSWorldGuest(OSWorldGuestDesktop):
    """Desktop whose guest server is hostile, with OSWorld's protocol."""

    def __init__(self, path: Path) -> None:
        super().__init__(CONFIG)
        self._path = path

    @property
    def address(self) -> Address:
        return self._path


NativeGuest.__abstractmethods__ = OSWorldGuest.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]

CALLS: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "is_alive": lambda desktop: desktop.is_alive(),
    "screenshot": lambda desktop: desktop.screenshot(),
    "settle": lambda desktop: desktop.settle(),
    "act": lambda desktop: desktop.act(Action(ActionKind.CLICK, x=1, y=2)),
    "execute": lambda desktop: desktop.execute(["true"], timeout_s=0.2),
    "launch": lambda desktop: desktop.launch(["true"]),
    "write_file": lambda desktop: desktop.write_file("~/a b", bytes(2 * MIB)),
    "read_file": lambda desktop: desktop.read_file("~/a b"),
    "open_path": lambda desktop: desktop.open_path("~/a b"),
    "wait_for_window": lambda desktop: desktop.wait_for_window("title", timeout_s=0.2),
    "activate_window": lambda desktop: desktop.activate_window("title"),
    "close_window": lambda desktop: desktop.close_window("title"),
}
NATIVE_CALLS = CALLS | {
    "windows": lambda desktop: desktop.windows(),
    "allow_terminal": lambda desktop: desktop.allow_terminal(),
    "end_setup": lambda desktop: desktop.end_setup(),
    "stop_policy_programs": lambda desktop: desktop.stop_policy_programs(),
    "stop_all_programs": lambda desktop: desktop.stop_all_programs(),
    "redraw": lambda desktop: desktop.redraw(),
}
OSWORLD_CALLS = CALLS | {"close_all_windows": lambda desktop: desktop.close_all_windows()}
_ALWAYS = {"screenshot", "settle", "execute"}
USES_THE_BODY = {
    "native": _ALWAYS | {"windows"},
    "osworld": _ALWAYS | {"act", "wait_for_window", "close_all_windows"},
}
ACKNOWLEDGED = set(NATIVE_CALLS) - {"is_alive", "read_file", "activate_window", "close_window"}


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostileGuest]:
    """Provide a hostile guest server; calls that the guest itself limits get a short margin."""
    for module in (guest_desktop, osworld_guest):
        monkeypatch.setattr(module, "MARGIN_S", CALL_S)
        monkeypatch.setattr(module, "OPEN_TIMEOUT_S", CALL_S)
    monkeypatch.setattr(guest_desktop, "_STOP_TIMEOUT_S", CALL_S)
    with tempfile.TemporaryDirectory(prefix="deskrl-test-") as folder, hostile_guest(Path(folder) / "guest") as guest:
        yield guest


def outcomes(calls: dict[str, Callable[[], Awaitable[Any]]]) -> dict[str, Any]:
    """Return the results or errors of calls, four at a time; fails if one hangs, blocks the event loop, or grows."""
    slots = asyncio.Semaphore(4)

    async def outcome(call: Callable[[], Awaitable[Any]]) -> Any:
        async with slots:
            try:
                return await call()
            except (DesktopError, FileNotFoundError) as error:
                return error

    async def run() -> list[Any]:
        async with asyncio.timeout(ENDED_WITHIN_S), Heartbeat() as heartbeat:
            results = await asyncio.gather(*(outcome(call) for call in calls.values()))
        assert heartbeat.longest_turn_cpu_s < MAX_TURN_CPU_S
        return results

    with MemoryPeak() as memory:
        results = asyncio.run(run())
    assert memory.growth_bytes < MAX_GROWTH_BYTES
    for result in results:
        if isinstance(result, DesktopError):
            assert str(result) and "\n" not in str(result) and len(str(result)) < 1500
    return dict(zip(calls, results, strict=True))


def outcome(call: Callable[[], Awaitable[Any]]) -> Any:
    """Return the result or DesktopError of one call, as `outcomes` does."""
    return outcomes({"call": call})["call"]


PROTOCOLS: dict[str, tuple[Callable[[Path], Desktop], dict[str, Callable[[Any], Awaitable[Any]]]]] = {
    "native": (NativeGuest, NATIVE_CALLS),
    "osworld": (OSWorldGuest, OSWORLD_CALLS),
}


def outcomes_of_all_calls(guest: HostileGuest, protocol: str, form: Form) -> dict[str, Any]:
    guest.form = form
    make, calls = PROTOCOLS[protocol]
    return outcomes({name: partial(call, make(guest.path)) for name, call in calls.items()})


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("form", INVALID_FORMS)
def test_an_invalid_response_ends_every_call_with_a_desktop_error(
    guest: HostileGuest, form: str, protocol: str
) -> None:
    results = outcomes_of_all_calls(guest, protocol, INVALID_FORMS[form])
    assert results.pop("is_alive") is False
    if "announced" in form:  # a file above the limit counts as missing
        assert isinstance(results.pop("read_file"), DesktopError | FileNotFoundError)
    assert {name: result for name, result in results.items() if not isinstance(result, DesktopError)} == {}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("form", BODY_FORMS)
def test_an_invalid_body_ends_every_call_that_uses_it_with_a_desktop_error(
    guest: HostileGuest, form: str, protocol: str
) -> None:
    results = outcomes_of_all_calls(guest, protocol, BODY_FORMS[form])
    used = USES_THE_BODY[protocol] | (ACKNOWLEDGED if protocol == "native" and form == "web page" else set())
    used &= set(results)
    assert {name: results[name] for name in used if not isinstance(results[name], DesktopError)} == {}


def test_a_redirect_is_not_followed(guest: HostileGuest) -> None:
    guest.form = INVALID_FORMS["redirect"]
    assert "status 302" in str(outcome(NativeGuest(guest.path).screenshot))
    assert guest.num_requests == 1


def test_proxies_of_the_environment_are_not_used(guest: HostileGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    guest.form = reply(b"{}")
    assert outcome(NativeGuest(guest.path).is_alive) is True

    async def over_tcp() -> int:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            address = server.sockets[0].getsockname()
            return (await http_client.send_request(address, "GET", "/", max_bytes=10, timeout_s=10)).status

    assert asyncio.run(over_tcp()) == 200


def test_a_guest_that_cannot_be_reached_is_gone(tmp_path: Path) -> None:
    result = outcome(NativeGuest(tmp_path / "missing").screenshot)
    assert isinstance(result, DesktopGone) and "cannot connect to the guest server" in str(result)


def test_a_caller_may_set_a_shorter_deadline(guest: HostileGuest) -> None:
    async def run() -> None:
        async with asyncio.timeout(0.05):
            await NativeGuest(guest.path).screenshot()

    with pytest.raises(TimeoutError):
        asyncio.run(run())


def test_a_command_on_a_stopped_guest_ends_after_its_timeout_and_the_margin(guest: HostileGuest) -> None:
    started_s = time.monotonic()
    result = outcome(lambda: NativeGuest(guest.path).execute(["true"], timeout_s=0.3))
    assert "did not respond" in str(result) and time.monotonic() - started_s >= 0.3 + CALL_S


def test_output_of_commands_is_limited_to_20_mib(guest: HostileGuest) -> None:
    reported = {"returncode": 3, "output": "é" * MIB, "error": "e", "status": "success"}
    guest.form = reply(json.dumps(reported).encode())
    for desktop in (NativeGuest(guest.path), OSWorldGuest(guest.path)):
        done = outcome(lambda desktop=desktop: desktop.execute(["true"]))
        assert (done.returncode, len(done.stdout), done.stderr) == (3, MIB, "e")
    reported["output"] = "x" * (20 * MIB)
    guest.form = reply(json.dumps(reported).encode())
    assert "at most 20971520 bytes" in str(outcome(lambda: NativeGuest(guest.path).execute(["true"])))


def test_a_file_above_the_limit_counts_as_missing(guest: HostileGuest) -> None:
    guest.form = reply(bytes(MIB))
    for desktop in (NativeGuest(guest.path), OSWorldGuest(guest.path)):
        assert len(outcome(lambda desktop=desktop: desktop.read_file("~/a"))) == MIB
    guest.form = endless(b"HTTP/1.1 200 OK\r\nContent-Length: 200000000000\r\n\r\n", bytes(65536))
    for desktop in (NativeGuest(guest.path), OSWorldGuest(guest.path)):
        assert isinstance(outcome(lambda desktop=desktop: desktop.read_file("~/a")), FileNotFoundError)


def picture(format: str, size: tuple[int, int] = (8, 6), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (10, 20, 30)).save(file, format, **options)
    return file.getvalue()


def test_a_screenshot_of_osworlds_protocol_is_a_png_or_jpeg(guest: HostileGuest) -> None:
    for format in ("PNG", "JPEG"):
        guest.form = reply(picture(format))
        image = outcome(OSWorldGuest(guest.path).screenshot)
        assert (image.size, image.mode) == ((8, 6), "RGB")
    for format in ("BMP", "GIF", "TIFF", "WEBP", "PPM", "EPS"):
        guest.form = reply(picture(format))
        assert "allowed format (PNG, JPEG)" in str(outcome(OSWorldGuest(guest.path).screenshot))


def test_a_small_png_of_169_megapixels_is_rejected_before_it_is_decoded(guest: HostileGuest) -> None:
    data = png(13000, 13000)
    assert len(data) < 30_000
    guest.form = reply(data)
    assert "13000 x 13000" in str(outcome(OSWorldGuest(guest.path).screenshot))


def test_the_largest_allowed_screenshot_is_decoded_beside_the_event_loop() -> None:
    data = png(7680, 4320)

    async def run() -> Image.Image:
        async with Heartbeat() as heartbeat:
            image = await image_decoding.decode_off_loop(partial(decode_image, data), timeout_s=60)
        assert heartbeat.longest_turn_cpu_s < MAX_TURN_CPU_S and heartbeat.num_beats > 2
        return image

    assert asyncio.run(run()).size == (7680, 4320)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_truncated_image_is_rejected(format: str) -> None:
    data = picture(format, (200, 200))
    for length in (10, len(data) // 2, len(data) - (20 if format == "PNG" else 100)):
        with pytest.raises(ImageError):
            decode_image(data[:length])


def test_a_jpeg_of_very_many_scans_is_rejected() -> None:
    data = picture("JPEG", (64, 64), progressive=True)
    assert decode_image(data).size == (64, 64)
    start = data.rindex(b"\xff\xda")
    with pytest.raises(ImageError, match="scans"):
        decode_image(data[:start] + data[start:-2] * 1000 + data[-2:])


def test_postscript_is_not_decoded_and_no_program_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = tmp_path / "started"
    for name in ("gs", "gswin32c"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\ntouch {started}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    postscript = picture("EPS")
    assert reward_of(image_check(), {"~/picture.png": postscript}) == 0.0
    with pytest.raises(ImageError):
        decode_image(postscript)
    assert not started.exists()


class FilesDesktop(Desktop):
    """Desktop that offers only files and the output of commands."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files

    async def read_file(self, path: str) -> bytes:
        if path not in self._files:
            raise FileNotFoundError(path)
        return self._files[path]


FilesDesktop.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]


def task(evaluator: dict[str, Any]) -> Task:
    return parse_task(json.dumps({"id": "t", "instruction": "-", "evaluator": evaluator}).encode(), "t")


def image_check(**options: Any) -> Task:
    return file_check("check_image_size", "~/picture.png", {"width": 8, "height": 6}, **options)


def file_check(func: str, path: str, rules: dict[str, Any], **options: Any) -> Task:
    result = {"type": "vm_file", "path": path, "dest": "x"}
    return task({"func": func, "result": result, "expected": {"type": "rule", "rules": rules}, "options": options})


def reward_of(evaluated: Task, files: dict[str, bytes]) -> float:
    """Return the reward for a desktop with these files; fails if the evaluation hangs or blocks the event loop."""

    async def run() -> float:
        async with asyncio.timeout(ENDED_WITHIN_S), Heartbeat() as heartbeat:
            reward = (await evaluate_task(FilesDesktop(files), evaluated, None)).reward
        assert heartbeat.longest_turn_cpu_s < MAX_TURN_CPU_S
        return reward

    return asyncio.run(run())


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_evaluators_decode_png_and_jpeg_and_other_formats_only_if_the_task_names_them(format: str) -> None:
    files = {"~/picture.png": picture(format)}
    assert reward_of(image_check(), files) == (1.0 if format in ("PNG", "JPEG") else 0.0)
    assert reward_of(image_check(formats=["BMP", "GIF", "TIFF", "WEBP"]), files) == 1.0


@pytest.mark.parametrize("formats", [["EPS"], ["PDF"], "BMP", [1], {}])
def test_a_task_cannot_name_a_format_that_is_not_safe(formats: Any) -> None:
    with pytest.raises(EvaluatorError, match="formats"):
        reward_of(image_check(formats=formats), {"~/picture.png": picture("PNG")})


@pytest.mark.parametrize("data", [png(13000, 13000), b"", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n" * 100])
def test_an_image_that_cannot_be_decoded_scores_0(data: bytes) -> None:
    assert reward_of(image_check(), {"~/picture.png": data}) == 0.0


def test_text_above_the_limit_scores_0() -> None:
    check = file_check("file_contains", "~/a", {"expected": ["needle"]})
    small = b"x " * 1000 + b"needle"
    assert reward_of(check, {"~/a": small}) == 1.0
    assert reward_of(check, {"~/a": small + b" x" * (evaluators.MAX_TEXT_BYTES // 2)}) == 0.0


def test_a_regular_expression_that_backtracks_without_end_scores_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluators, "_PATTERN_TIMEOUT_S", 0.3)
    check = file_check("check_list", "~/a", {"expect": [r"^(a|aa|b|bb)+$"]})
    assert reward_of(check, {"~/a": b"ab" * 5}) == 1.0
    assert reward_of(check, {"~/a": b"a" * 60 + b"!"}) == 0.0


def answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str) -> None:
    """Replace the evaluator process by a shell program that answers on its standard output."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{program}\n")
    script.chmod(0o755)
    monkeypatch.setattr(evaluator_client, "interpreter_path", lambda: script)
    monkeypatch.setattr(evaluator_client, "_TIMEOUT_S", 2.0)
    monkeypatch.setattr(helper_process, "_KILL_TIMEOUT_S", 0.5)


@pytest.mark.parametrize(
    "program",
    [
        "exec sleep 1000",
        "exec cat /dev/zero",
        "sleep 10",
        "read line; echo '{}'; exec sleep 1000",
        "read line; echo '[1]'; exec sleep 1000",
        'read line; echo \'{"reward": NaN, "checks": []}\'; exec sleep 1000',
        'read line; echo \'{"reward": 2, "checks": []}\'; exec sleep 1000',
        'read line; echo \'{"reward": "1", "checks": []}\'; exec sleep 1000',
        'read line; echo \'{"reward": 1, "checks": {}}\'; exec sleep 1000',
        "read line; echo '{\"fault\": [1]}'; exec sleep 1000",
    ],
)
def test_the_evaluator_process_is_bounded_and_its_result_is_validated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str
) -> None:
    answers(monkeypatch, tmp_path, program)

    async def run() -> None:
        client = OSWorldEvaluatorClient()
        try:
            async with asyncio.timeout(ENDED_WITHIN_S):
                await client.evaluate({}, ("127.0.0.1", 1), {}, {})
        finally:
            await client.close()

    with MemoryPeak() as memory, pytest.raises(OSWorldEvaluatorError):
        asyncio.run(run())
    assert memory.growth_bytes < MAX_GROWTH_BYTES


METRICS = """
import subprocess
from PIL import Image

def opens_an_image(path, rules):
    Image.open(path).load()
    return 1.0

def starts_a_program(path, rules):
    subprocess.run(["true"])
    return 1.0

def needs_much_memory(path, rules):
    return float(len(bytearray(6 * 1024**3)))

def writes_a_large_file(path, rules):
    with open(path + ".large", "wb") as file:
        file.truncate(2 * 1024**3)
    return 1.0

def returns_2(path, rules):
    return 2.0
"""
BASIC_OS = """
def check_gnome_favorite_apps(path, rules):
    eval("__import__('os').mkdir(%r)" % rules["marker"])
    return 1.0
"""
GETTERS = """
import requests

def get_vm_file(env, config):
    response = requests.post(f"http://{env.vm_ip}:{env.server_port}/file")
    response.raise_for_status()
    path = f"{env.cache_dir}/file"
    with open(path, "wb") as file:
        file.write(response.content)
    return path

def get_rule(env, config):
    return config["rules"]
"""


@pytest.fixture
def osworld_evaluators(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Replace OSWorld's evaluators by a small package in this interpreter's environment."""
    evaluators_dir = tmp_path / "packages" / "desktop_env" / "evaluators"
    controllers = evaluators_dir.parent / "controllers"
    for folder in (evaluators_dir / "metrics", evaluators_dir / "getters", controllers):
        folder.mkdir(parents=True)
    for folder in (evaluators_dir.parent, evaluators_dir, controllers):
        (folder / "__init__.py").touch()
    (evaluators_dir / "metrics" / "__init__.py").write_text(
        f"from desktop_env.evaluators.metrics.basic_os import check_gnome_favorite_apps\n{METRICS}"
    )
    (evaluators_dir / "metrics" / "basic_os.py").write_text(BASIC_OS)
    (evaluators_dir / "getters" / "__init__.py").write_text(GETTERS)
    (controllers / "python.py").write_text("class PythonController:\n    def __init__(self, *_): pass\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setattr(evaluator_client, "interpreter_path", lambda: Path(sys.executable))


@pytest.mark.parametrize(
    ("func", "body", "reason"),
    [
        ("opens_an_image", picture("PNG"), ""),
        ("opens_an_image", picture("EPS"), "UnidentifiedImageError"),
        ("starts_a_program", b"", "PermissionError: evaluators must not start programs"),
        ("needs_much_memory", b"", "MemoryError"),
        ("writes_a_large_file", b"", "OSError"),
        ("returns_2", b"", "Expected `float` <= 1"),
        ("check_gnome_favorite_apps", b"", "ValueError: malformed node"),
    ],
)
@pytest.mark.usefixtures("osworld_evaluators")
def test_osworlds_evaluators_run_within_limits_and_start_no_programs(
    guest: HostileGuest, tmp_path: Path, func: str, body: bytes, reason: str
) -> None:
    guest.form = reply(body, "200 OK")
    marker = tmp_path / "marker"
    evaluated = file_check(func, "~/a", {"marker": str(marker)})

    async def run() -> float:
        client = OSWorldEvaluatorClient()
        try:
            return (await client.evaluate(json.loads(evaluated.data), guest.path, {}, {})).reward
        finally:
            await client.close()

    if reason:
        with pytest.raises(OSWorldEvaluatorError, match=reason):
            asyncio.run(run())
    else:
        assert asyncio.run(run()) == 1.0
    assert not marker.exists()


@pytest.mark.usefixtures("osworld_evaluators")
def test_osworlds_evaluators_follow_no_redirect(guest: HostileGuest) -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as other:
        other.timeout = 0.2
        location = f"Location: http://127.0.0.1:{other.server_address[1]}/"
        guest.form = reply(b"", "302 Found", location)
        evaluated = file_check("opens_an_image", "~/a", {})

        async def run() -> None:
            client = OSWorldEvaluatorClient()
            with pytest.raises(OSWorldEvaluatorError):
                await client.evaluate(json.loads(evaluated.data), guest.path, {}, {})
            await client.close()

        asyncio.run(run())
        other.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.socket.accept()


def test_a_slow_evaluation_does_not_delay_that_of_another_desktop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers(
        monkeypatch,
        tmp_path,
        "while read line; do\n"
        'case "$line" in *slow*) exec sleep 1000;; *) echo \'{"reward": 1, "checks": []}\';; esac\n'
        "done",
    )

    async def run() -> None:
        client = OSWorldEvaluatorClient()
        slow = asyncio.create_task(client.evaluate({"slow": True}, ("127.0.0.1", 1), {}, {}))
        await asyncio.sleep(0.1)
        for _ in range(3):
            assert (await client.evaluate({}, ("127.0.0.1", 1), {}, {})).reward == 1.0
        assert not slow.done()
        with pytest.raises(OSWorldEvaluatorError, match="did not respond within"):
            await slow
        await client.close()

    asyncio.run(run())


@pytest.mark.parametrize("protocol", [NativeGuest, OSWorldGuest])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzzed_responses_raise_only_desktop_errors(protocol: Any, data: st.DataObject, guest: HostileGuest) -> None:
    body = data.draw(st.binary(max_size=40) | st.sampled_from([b"{}", b"[]", b'{"returncode": 0}', picture("PNG")]))
    headers = st.sampled_from(
        [
            b"Content-Length: %d" % len(body),
            b"Transfer-Encoding: chunked",
            b"X-Width: 320",
            b"X-Height: 200",
            b"X-Rows: 0-1",
            b"\xff",
        ]
    )
    lines = [data.draw(st.sampled_from([b"HTTP/1.1 200 OK", b"HTTP/1.0 404", b"HTTP/1.1 500 \xff"]))]
    lines += data.draw(st.lists(headers | st.binary(max_size=20), max_size=4))
    guest.form = raw(b"\r\n".join([*lines, b"", body]))
    call = data.draw(st.sampled_from(sorted(CALLS)))

    async def run() -> None:
        try:
            async with asyncio.timeout(ENDED_WITHIN_S):
                await CALLS[call](protocol(guest.path))
        except (DesktopError, FileNotFoundError):
            pass

    asyncio.run(run())


def test_a_dripping_form_is_served_until_the_client_gives_up(guest: HostileGuest) -> None:
    guest.form = drip(b"HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n")
    started_s = time.monotonic()
    assert isinstance(outcome(NativeGuest(guest.path).screenshot), DesktopError)
    assert time.monotonic() - started_s < ENDED_WITHIN_S
