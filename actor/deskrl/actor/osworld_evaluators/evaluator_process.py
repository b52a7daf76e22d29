"""Evaluator process: evaluates end states with the getters and metrics of desktop-env, in that package's environment.

Reads requests from standard input and writes responses to standard output until the input is closed. Each request and
each response is one line of JSON:

    {"task": {...}, "socket": "/path" | "address": ["host", 5000], "assets": {"https://...": "/local/copy"},
     "outputs": {"file name": "output of a setup step"}}
    {"reward": 1.0, "checks": [{"func": ..., "score": ...}]}  or  {"fault": "reason"}

The response to `{"names": true}` contains the names of all metrics and getters. This file is started by its path and
imports nothing from deskrl. A guest server that cannot be reached is a fault, even if a getter treats it as an empty
result.

Getters and metrics read what the policy wrote. Memory and files of this process are limited, no decoder may start a
program, and redirects of the guest server are not followed. The client limits the time of each request.
"""

from __future__ import annotations

import ast
import json
import os
import resource
import shutil
import socket
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO

_CHUNK_BYTES = 1024**2
_MAX_MEMORY_BYTES = 4 * 1024**3
_MAX_FILE_BYTES = 1024**3
_PROGRAM_EVENTS = {
    *("subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn"),
}

_faults: list[str] = []
"""Connections that failed during the current request."""


def main() -> None:
    """Respond to requests until the input is closed."""
    responses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of getters must not mix with responses
    _limit_resources()
    _stub_easyocr()
    _record_connection_errors()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            response = _names() if request.get("names") else _evaluate(request)
        except Exception as error:  # evaluators are arbitrary code of tasks; no exception may end the process
            response = {"fault": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        _write(responses, response)


def _write(responses: TextIO, response: dict[str, Any]) -> None:
    responses.write(json.dumps(response, default=str) + "\n")
    responses.flush()


def _limit_resources() -> None:
    """Limit memory and files. RLIMIT_DATA leaves out address space that is only reserved, unlike RLIMIT_AS."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # each thread allocates tens of MB
        os.environ.setdefault(name, "1")
    for kind, limit in (
        (resource.RLIMIT_DATA, _MAX_MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, _MAX_FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard_limit = resource.getrlimit(kind)[1]
        limit = limit if hard_limit == resource.RLIM_INFINITY else min(limit, hard_limit)
        resource.setrlimit(kind, (limit, limit))


@cache
def _deny_programs() -> None:
    """Deny the start of programs and remove the image decoder that needs one. Called after the import of the metrics,
    during which libraries are located by programs.
    """
    from PIL import Image

    Image.init()
    Image.OPEN.pop("EPS", None)
    Image.ID[:] = [name for name in Image.ID if name != "EPS"]
    sys.addaudithook(_check_event)


def _check_event(event: str, _: Any) -> None:
    if event in _PROGRAM_EVENTS:
        raise PermissionError("evaluators must not start programs")


def _stub_easyocr() -> None:
    """Register a stub of easyocr, which needs PyTorch: all metrics import it, and the metric of three tasks uses it."""
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


def _evaluate(request: dict[str, Any]) -> dict[str, Any]:
    evaluator = request["task"]["evaluator"]
    with tempfile.TemporaryDirectory(prefix="deskrl-evaluate-") as directory:
        cache = Path(directory)
        for name, text in request.get("outputs", {}).items():
            (cache / name).write_text(text)
        _place_assets(evaluator, request.get("assets", {}), cache)
        with _guest_address(request) as address:
            _faults.clear()
            response = _evaluate_checks(evaluator, _environment(address, cache))
        if _faults:
            raise RuntimeError(_faults[0])
        return response


def _evaluate_checks(evaluator: dict[str, Any], env: Any) -> dict[str, Any]:
    """Evaluate all checks and combine their scores in the same way as desktop-env."""
    from desktop_env.evaluators import getters, metrics
    from desktop_env.evaluators.metrics import basic_os

    basic_os.eval = ast.literal_eval  # it evaluates the output of a command on the desktop as Python code
    _deny_programs()
    is_list = isinstance(evaluator["func"], list)
    funcs = evaluator["func"] if is_list else [evaluator["func"]]
    parts = {key: _parallel(evaluator.get(key), is_list, len(funcs)) for key in ("result", "expected", "options")}
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
        except FileNotFoundError:  # as in desktop-env
            score = 0.0
        checks.append({"func": func, "score": score})
        if score == (0.0 if conj == "and" else 1.0):
            break
    scores = [check["score"] for check in checks]
    mean = 0.0 if 0.0 in scores else sum(scores) / len(scores)
    return {"reward": max(scores) if conj == "or" else mean, "checks": checks}


def _parallel(value: Any, is_list: bool, num_checks: int) -> list[Any]:
    return (value or [None] * num_checks) if is_list else [value]


def _environment(address: tuple[str, int], cache: Path) -> Any:
    """Return a replacement for desktop-env's environment with the attributes that getters use."""
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


def _record_connection_errors() -> None:
    """Replace the request method of requests by one that records failed connections in `_faults`."""
    import requests

    original = requests.Session.request

    def recording(self: Any, method: str, url: str, *arguments: Any, **options: Any) -> Any:
        options["allow_redirects"] = False  # a guest must not direct requests to other servers
        try:
            return original(self, method, url, *arguments, **options)
        except requests.RequestException as error:
            _faults.append(f"{method} {url}: {type(error).__name__}")
            raise

    setattr(requests.Session, "request", recording)  # noqa: B010 - mypy rejects an assignment to a method


def _place_assets(evaluator: dict[str, Any], assets: dict[str, str], cache: Path) -> None:
    """Copy local files to where the getter `cloud_file` looks for them before it downloads."""
    expected = evaluator.get("expected")
    for item in [*(expected if isinstance(expected, list) else [expected]), *_results(evaluator)]:
        if item and item.get("type") == "cloud_file":
            is_multiple = item.get("multi", False)
            urls, names = (item["path"], item["dest"]) if is_multiple else ([item["path"]], [item["dest"]])
            for url, name in zip(urls, names, strict=True):
                shutil.copyfile(assets[url], cache / name)


def _results(evaluator: dict[str, Any]) -> list[Any]:
    result = evaluator.get("result")
    return result if isinstance(result, list) else [result]


@contextmanager
def _guest_address(request: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield a TCP address of the guest server, forwarded to its Unix socket if it has one: getters support only TCP."""
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
            client, _ = listener.accept()
        except OSError:  # the evaluation is complete
            return
        guest = socket.socket(socket.AF_UNIX)
        try:
            guest.connect(path)
        except OSError:  # the getter sees a closed connection
            client.close()
            continue
        for source, sink in ((client, guest), (guest, client)):
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
