"""Fetching over HTTP what tasks download, into the asset cache. Knows addresses, no tasks.

A transfer that breaks off goes on from where it was, in this call or in the next one, if the server says that it still
serves the same (RFC 9110, If-Range); else it begins anew. An address that cannot be had is told with its reason, and
holds no other one up.
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

from deskrl.actor.tasks.assets import address_key, asset_folder, find_fetched, keep

_ATTEMPTS = 3
"""Times in a row that an address may yield nothing new before it is given up."""
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S = 15.0, 60.0
_CHUNK_BYTES = 64 * 1024
_PASSING = {429, 500, 502, 503, 504}
_PAGES = {".htm", ".html", ""}


class _Refused(Exception):
    """The address will not be had by asking again."""


class _Interrupted(Exception):
    """The transfer broke off, or did not begin, for a reason that may be over."""


class _NoAnswer(_Interrupted):
    """The host cannot be reached, or has stopped answering."""


@dataclass(frozen=True)
class Fetched:
    """What came of one address."""

    url: str
    num_bytes: int = 0
    """Of the local copy."""
    received_bytes: int = 0
    """Of these, what this call transferred: none where the cache had it."""
    error: str = ""
    """Why there is no local copy; empty where there is one."""


def fetch_assets(
    urls: Sequence[str], num_at_once: int = 4, pause_s: float = 1.0, tell: Callable[[Fetched], None] | None = None
) -> list[Fetched]:
    """Bring what the addresses serve into the asset cache, except what is there.

    Args:
        urls: addresses, each once.
        num_at_once: transfers at a time.
        pause_s: before asking again an address that yielded nothing, doubled with each time.
        tell: called with each result as it is there, in this thread.
    """
    stopped = threading.Event()
    silent: set[str] = set()
    with ThreadPoolExecutor(num_at_once) as pool:
        try:
            transfers = [pool.submit(_Transfer(url, pause_s, stopped, silent).run) for url in urls]
            for transfer in as_completed(transfers):
                if tell is not None:
                    tell(transfer.result())
        finally:
            stopped.set()  # what is still under way stops at its next chunk, and stays for the next call
            pool.shutdown(cancel_futures=True)
    return [transfer.result() for transfer in transfers]


class _Transfer:
    """The way of one address into the cache."""

    def __init__(self, url: str, pause_s: float, stopped: threading.Event, silent: set[str]) -> None:
        self._url = url
        self._pause_s = pause_s
        self._stopped = stopped
        self._silent = silent  # hosts that were asked often enough, for any address, and gave no answer
        self._partial = asset_folder() / "partial" / address_key(url)
        self._validator = self._partial.with_suffix(".validator")
        self._received_bytes = 0

    @property
    def _host(self) -> str:
        return urlsplit(self._url).netloc

    def run(self) -> Fetched:
        """Fetch, unless the cache has it."""
        try:
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            with _alone(self._partial.with_suffix(".lock")):
                copy = find_fetched(self._url)
                if copy is None:
                    self._receive_all()
                    copy = keep(self._url, self._partial)
                    self._validator.unlink(missing_ok=True)
                return Fetched(self._url, copy.stat().st_size, self._received_bytes)
        except (_Refused, _Interrupted) as error:
            return Fetched(self._url, received_bytes=self._received_bytes, error=str(error))
        except OSError as error:
            reason = f"cannot be written to {asset_folder()}: {error.strerror or error}"
            return Fetched(self._url, received_bytes=self._received_bytes, error=reason)

    def _receive_all(self) -> None:
        """Ask until the whole of it is there, or nothing more comes."""
        vain = 0
        while True:
            before = self._received_bytes
            try:
                self._receive()
                return
            except _Interrupted as error:
                vain = 0 if self._received_bytes > before else vain + 1
                known = isinstance(error, _NoAnswer) and self._host in self._silent
                if vain == _ATTEMPTS or known or self._stopped.is_set():
                    if isinstance(error, _NoAnswer):
                        self._silent.add(self._host)
                    raise
            if vain:
                time.sleep(self._pause_s * 2 ** (vain - 1))

    def _receive(self) -> None:
        """One answer of the server, written as it comes."""
        have = self._partial.stat().st_size if self._partial.exists() and self._validator.exists() else 0
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": self._validator.read_text()}
        try:
            with requests.get(
                self._url, headers=headers, stream=True, timeout=(_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S)
            ) as response:
                self._check(response)
                begins = have if response.status_code == HTTPStatus.PARTIAL_CONTENT else 0
                self._write(response, begins)
        except requests.RequestException as error:
            if isinstance(error, ValueError):
                raise _Refused(f"is no address that can be fetched: {error}") from error
            raise _NoAnswer(_reason(error)) from error

    def _check(self, response: requests.Response) -> None:
        status = response.status_code
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            self._validator.unlink()  # what is here is not the beginning of what it serves now
            raise _Interrupted("the server no longer serves what had begun")
        if status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            told = f"the server answers {status} {response.reason}"
            raise (_Interrupted if status in _PASSING else _Refused)(told)
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
        if kind == "text/html" and PurePosixPath(urlsplit(self._url).path).suffix.lower() not in _PAGES:
            raise _Refused("the server answers with a web page in place of the file")

    def _write(self, response: requests.Response, begins: int) -> None:
        encoded = "Content-Encoding" in response.headers
        length = response.headers.get("Content-Length")
        ends = None if encoded or length is None else begins + int(length)
        with open(self._partial, "ab" if begins else "wb") as file:
            if not begins:  # not before what an earlier state of the file left here is gone
                self._note_validator("" if encoded else _strong_validator(response))
            for chunk in response.iter_content(_CHUNK_BYTES):
                file.write(chunk)
                self._received_bytes += len(chunk)
                if self._stopped.is_set():
                    raise _Interrupted("it was stopped")
            if ends is not None and file.tell() != ends:
                raise _Interrupted(f"{file.tell()} bytes came of {ends}")

    def _note_validator(self, validator: str) -> None:
        """Remember by what the server knows this state of the file; without it, nothing can be gone on with."""
        if validator:
            self._validator.write_text(validator)
        else:
            self._validator.unlink(missing_ok=True)


def _strong_validator(response: requests.Response) -> str:
    tag = str(response.headers.get("ETag", ""))
    return tag if tag and not tag.startswith("W/") else str(response.headers.get("Last-Modified", ""))


def _reason(error: requests.RequestException) -> str:
    """The last part of a long story."""
    if isinstance(error, requests.Timeout):
        return "the server does not answer in time"
    cause = error.args[0] if error.args else error
    return f"the connection fails: {str(getattr(cause, 'reason', cause)).rpartition(': ')[2]}"


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """No two processes write one address's file; the second finds it done."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
