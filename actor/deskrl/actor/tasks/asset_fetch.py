"""Asset download: fetches the files that tasks use over HTTP into the asset cache.

An interrupted transfer is resumed, in the same call or in the next one, if the server confirms that the file has not
changed (RFC 9110, If-Range); otherwise it starts from the beginning. A URL that cannot be fetched is reported with the
reason and does not delay other URLs.
"""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import requests

from deskrl.actor.task import Task
from deskrl.actor.tasks.assets import asset_dir, find_fetched, store_asset, url_key
from deskrl.actor.tasks.requirements import missing_files, task_requirements

_MAX_ATTEMPTS = 3
"""Consecutive attempts without a received byte after which a URL is reported as failed."""
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S = 15.0, 60.0
_CHUNK_BYTES = 64 * 1024
_TRANSIENT_STATUSES = {429, 500, 502, 503, 504}
_PAGE_SUFFIXES = {".htm", ".html", ""}


class _PermanentError(Exception):
    """The URL cannot be fetched, and another attempt would not help."""


class _TransientError(Exception):
    """The transfer was interrupted or did not start; another attempt may succeed."""


class _HostUnreachableError(_TransientError):
    """The host cannot be reached or does not respond."""


@dataclass(frozen=True)
class FetchResult:
    """Result for one URL."""

    url: str
    num_bytes: int = 0
    """Size of the local copy."""
    received_bytes: int = 0
    """Number of bytes transferred by this call; 0 if the file was cached."""
    error: str = ""
    """Reason why there is no local copy; empty if there is one."""


@dataclass(frozen=True)
class TaskAssets:
    """Files that tasks use: whether they are cached, and which tasks use those that are not."""

    num_cached: int
    """Number of files in the cache."""
    uncached: dict[str, list[str]]
    """Ids of the tasks that use a file that is not cached, by URL."""


def find_task_assets(tasks: Sequence[Task]) -> TaskAssets:
    """Look up the files that tasks use in the asset cache."""
    users: dict[str, list[str]] = {}
    for task in tasks:
        required = task_requirements(task)
        missing = missing_files(task, required)
        for url in required.files:
            users.setdefault(url, []).extend([task.id] * (url in missing))
    uncached = {url: ids for url, ids in users.items() if ids}
    return TaskAssets(len(users) - len(uncached), uncached)


def fetch_assets(
    urls: Sequence[str],
    num_workers: int = 4,
    backoff_s: float = 1.0,
    on_result: Callable[[FetchResult], None] | None = None,
) -> list[FetchResult]:
    """Fetch files into the asset cache, except those that are cached.

    Args:
        urls: URLs without duplicates.
        num_workers: maximum number of simultaneous transfers.
        backoff_s: delay in seconds before the second attempt at a URL; doubled with each further attempt.
        on_result: called with each result as soon as it is available, in the calling thread.

    Returns:
        The results in the order of `urls`.
    """
    stopped = threading.Event()
    unreachable: set[str] = set()
    with ThreadPoolExecutor(num_workers) as pool:
        try:
            transfers = [pool.submit(_Transfer(url, backoff_s, stopped, unreachable).run) for url in urls]
            for transfer in as_completed(transfers):
                if on_result is not None:
                    on_result(transfer.result())
        finally:
            stopped.set()  # transfers in progress stop after their next chunk; the next call resumes them
            pool.shutdown(cancel_futures=True)
    return [transfer.result() for transfer in transfers]


class _Transfer:
    """Transfer of one URL into the cache."""

    def __init__(self, url: str, backoff_s: float, stopped: threading.Event, unreachable: set[str]) -> None:
        self._url = url
        self._backoff_s = backoff_s
        self._stopped = stopped
        self._unreachable = unreachable  # hosts for which the attempts of some URL are used up; shared by all transfers
        self._partial = asset_dir() / "partial" / url_key(url)
        self._validator = self._partial.with_suffix(".validator")
        self._received_bytes = 0

    @property
    def _host(self) -> str:
        return urlsplit(self._url).netloc

    def run(self) -> FetchResult:
        """Fetch the file unless it is cached."""
        try:
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            with _exclusive(self._partial.with_suffix(".lock")):
                copy = find_fetched(self._url)
                if copy is None:
                    self._receive_all()
                    copy = store_asset(self._url, self._partial)
                    self._validator.unlink(missing_ok=True)
                return FetchResult(self._url, copy.stat().st_size, self._received_bytes)
        except (_PermanentError, _TransientError) as error:
            return FetchResult(self._url, received_bytes=self._received_bytes, error=str(error))
        except OSError as error:
            reason = f"cannot be written to {asset_dir()}: {error.strerror or error}"
            return FetchResult(self._url, received_bytes=self._received_bytes, error=reason)

    def _receive_all(self) -> None:
        """Repeat requests until the file is complete or the attempts are used up.

        Hand-written because attempts that received something do not count, which tenacity has no rule for.
        """
        num_failed = 0
        while True:
            before = self._received_bytes
            try:
                self._receive()
                return
            except _TransientError as error:
                num_failed = 0 if self._received_bytes > before else num_failed + 1
                no_response = isinstance(error, _HostUnreachableError)
                is_known = no_response and self._host in self._unreachable
                if num_failed == _MAX_ATTEMPTS or is_known or self._stopped.is_set():
                    if no_response:
                        self._unreachable.add(self._host)
                    raise
            if num_failed:
                time.sleep(self._backoff_s * 2 ** (num_failed - 1))

    def _receive(self) -> None:
        """Send one request and write the body of the response to the partial file."""
        offset = self._partial.stat().st_size if self._partial.exists() and self._validator.exists() else 0
        headers = {"Accept-Encoding": "identity"}
        if offset:
            headers |= {"Range": f"bytes={offset}-", "If-Range": self._validator.read_text()}
        try:
            with requests.get(
                self._url, headers=headers, stream=True, timeout=(_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S)
            ) as response:
                self._check(response)
                is_partial = response.status_code == HTTPStatus.PARTIAL_CONTENT
                self._write(response, offset if is_partial else 0)
        except requests.RequestException as error:
            if isinstance(error, ValueError):
                raise _PermanentError(f"invalid URL: {error}") from error
            raise _HostUnreachableError(_describe(error)) from error

    def _check(self, response: requests.Response) -> None:
        status = response.status_code
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            self._validator.unlink()  # the file on the server has changed
            raise _TransientError("the file changed on the server during the transfer")
        if status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            error = _TransientError if status in _TRANSIENT_STATUSES else _PermanentError
            raise error(f"the server responded {status} {response.reason}")
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
        if kind == "text/html" and PurePosixPath(urlsplit(self._url).path).suffix.lower() not in _PAGE_SUFFIXES:
            raise _PermanentError("the server responded with a web page instead of the file")

    def _write(self, response: requests.Response, offset: int) -> None:
        encoded = "Content-Encoding" in response.headers
        length = response.headers.get("Content-Length")
        total_bytes = None if encoded or length is None else offset + int(length)
        with open(self._partial, "ab" if offset else "wb") as file:
            if not offset:  # after the old content is truncated, which the new validator does not describe
                self._store_validator("" if encoded else _strong_validator(response))
            for chunk in response.iter_content(_CHUNK_BYTES):
                file.write(chunk)
                self._received_bytes += len(chunk)
                if self._stopped.is_set():
                    raise _TransientError("the download was cancelled")
            if total_bytes is not None and file.tell() != total_bytes:
                raise _TransientError(f"the connection was closed after {file.tell()} of {total_bytes} bytes")

    def _store_validator(self, validator: str) -> None:
        """Store the validator of the file, without which a transfer cannot be resumed; empty: delete it."""
        if validator:
            self._validator.write_text(validator)
        else:
            self._validator.unlink(missing_ok=True)


def _strong_validator(response: requests.Response) -> str:
    tag = str(response.headers.get("ETag", ""))
    return tag if tag and not tag.startswith("W/") else str(response.headers.get("Last-Modified", ""))


def _describe(error: requests.RequestException) -> str:
    """Return a short description of a connection error: the innermost cause."""
    if isinstance(error, requests.Timeout):
        return "the server did not respond in time"
    cause = error.args[0] if error.args else error
    return f"the connection failed: {str(getattr(cause, 'reason', cause)).rpartition(': ')[2]}"


@contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, so that only one thread of one process transfers a URL at a time."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
