"""The evaluator process: judges states by desktop-env's getters and metrics. Runs in that package's environment.

Reads requests from standard input and writes answers to standard output, each a line of JSON, until its input ends:

    {"task": {...}, "socket": "/path" | "address": ["host", 5000], "assets": {"https://...": "/local/copy"},
     "outputs": {"file name": "what a setup step printed"}}
    {"reward": 1.0, "checks": [{"func": ..., "score": ...}]}  or  {"fault": "what could not be done"}

`{"names": true}` is answered by the names of all metrics and getters. Knows nothing of deskrl: it is started by path.
A guest that cannot be reached is a fault, also where a getter would take it for an empty answer.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

_CHUNK_BYTES = 1024**2

_faults: list[str] = []
"""Connections that failed during the present request."""


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what getters print is no answer
    _stand_in_for_easyocr()
    _note_faults()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _names() if request.get("names") else _judge(request)
        except Exception as error:  # evaluators come with tasks: whatever they raise is no verdict
            answer = {"fault": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        _write(answers, answer)


def _write(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer, default=str) + "\n")
    answers.flush()


def _stand_in_for_easyocr() -> None:
    """A module that three tasks' metric needs to run, and all metrics to be imported; it would bring PyTorch along."""
    if "easyocr" not in sys.modules:
        module = types.ModuleType("easyocr")

        def reader(*_: Any, **__: Any) -> None:
            raise RuntimeError("easyocr is not installed in the evaluators' environment")

        module.Reader = reader  # type: ignore[attr-defined]
        try:
            __import__("easyocr")
        except ImportError:
            sys.modules["easyocr"] = module


def _names() -> dict[str, Any]:
    from desktop_env.evaluators import getters, metrics

    return {
        "metrics": sorted(name for name in dir(metrics) if callable(getattr(metrics, name))),
        "getters": sorted(name[4:] for name in dir(getters) if name.startswith("get_")),
    }


def _judge(request: dict[str, Any]) -> dict[str, Any]:
    evaluator = request["task"]["evaluator"]
    with tempfile.TemporaryDirectory(prefix="deskrl-judge-") as folder:
        cache = Path(folder)
        for name, text in request.get("outputs", {}).items():
            (cache / name).write_text(text)
        _place_assets(evaluator, request.get("assets", {}), cache)
        with _reachable(request) as address:
            _faults.clear()
            answer = _join(evaluator, _environment(address, cache))
        if _faults:
            raise RuntimeError(_faults[0])
        return answer


def _join(evaluator: dict[str, Any], env: Any) -> dict[str, Any]:
    """All checks, joined as desktop-env joins them."""
    from desktop_env.evaluators import getters, metrics

    many = isinstance(evaluator["func"], list)
    funcs = evaluator["func"] if many else [evaluator["func"]]
    parts = {key: _parallel(evaluator.get(key), many, len(funcs)) for key in ("result", "expected", "options")}
    conj = evaluator.get("conj", "and")
    checks: list[dict[str, Any]] = []
    for index, func in enumerate(funcs):
        try:
            values = [
                getattr(getters, f"get_{part['type']}")(env, part)
                for part in (parts["result"][index], parts["expected"][index])
                if part
            ]
            score = float(getattr(metrics, func)(*values, **(parts["options"][index] or {})))
        except FileNotFoundError:  # desktop-env's own rule
            score = 0.0
        checks.append({"func": func, "score": score})
        if score == (0.0 if conj == "and" else 1.0):
            break
    scores = [check["score"] for check in checks]
    mean = 0.0 if 0.0 in scores else sum(scores) / len(scores)
    return {"reward": max(scores) if conj == "or" else mean, "checks": checks}


def _parallel(value: Any, many: bool, number: int) -> list[Any]:
    return (value or [None] * number) if many else [value]


def _environment(address: tuple[str, int], cache: Path) -> Any:
    """What getters use of desktop-env's environment."""
    import requests
    from desktop_env.controllers.python import PythonController

    host, port = address
    controller = PythonController(host, port)
    controller.retry_times, controller.retry_interval = 1, 0
    return types.SimpleNamespace(
        controller=controller,
        vm_ip=host,
        server_port=port,
        cache_dir=str(cache),
        vm_platform=requests.get(f"http://{host}:{port}/platform", timeout=30).text.strip(),
        vm_machine="x86_64",
        current_use_proxy=False,
        os_type="Ubuntu",
    )


def _note_faults() -> None:
    """Have connections that fail from now on noted in `_faults`."""
    import requests

    plain = requests.Session.request

    def noting(self: Any, method: str, url: str, *arguments: Any, **options: Any) -> Any:
        try:
            return plain(self, method, url, *arguments, **options)
        except requests.RequestException as error:
            _faults.append(f"{method} {url}: {type(error).__name__}")
            raise

    setattr(requests.Session, "request", noting)  # noqa: B010 - a method is replaced, which mypy forbids otherwise


def _place_assets(evaluator: dict[str, Any], assets: dict[str, str], cache: Path) -> None:
    """Put local copies of files where the getter `cloud_file` looks before it fetches."""
    expected = evaluator.get("expected")
    for item in [*(expected if isinstance(expected, list) else [expected]), *_results(evaluator)]:
        if item and item.get("type") == "cloud_file":
            many = item.get("multi", False)
            urls, names = (item["path"], item["dest"]) if many else ([item["path"]], [item["dest"]])
            for url, name in zip(urls, names, strict=True):
                shutil.copyfile(assets[url], cache / name)


def _results(evaluator: dict[str, Any]) -> list[Any]:
    result = evaluator.get("result")
    return result if isinstance(result, list) else [result]


@contextmanager
def _reachable(request: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """The guest's TCP address; one that leads to its Unix socket where it has that: getters know only HTTP over TCP."""
    if "socket" not in request:
        host, port = request["address"]
        yield host, port
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_forward, args=(listener, request["socket"]), daemon=True).start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)


def _forward(listener: socket.socket, path: str) -> None:
    while True:
        try:
            outside, _ = listener.accept()
        except OSError:  # all is judged
            return
        inside = socket.socket(socket.AF_UNIX)
        try:
            inside.connect(path)
        except OSError:  # seen by the getter as a connection that breaks off
            outside.close()
            continue
        for source, sink in ((outside, inside), (inside, outside)):
            threading.Thread(target=_copy, args=(source, sink), daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(_CHUNK_BYTES):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        sink.close()


if __name__ == "__main__":
    main()
