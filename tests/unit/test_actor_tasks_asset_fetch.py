"""Specification of the asset cache: files are fetched once, transfers are resumed, failures have reasons."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from asset_cache_kit import osworld_cache_path
from file_server_kit import HANG_UP, Site, serving

from deskrl.actor.tasks.asset_fetch import FetchResult, fetch_assets
from deskrl.actor.tasks.assets import asset_dir, find_asset
from deskrl.cli.main import main

DATA = os.urandom(1_000_000)
PIECE = 65_536
"""Size of the chunks that are written; an incomplete chunk of an interrupted transfer is lost."""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(Site(files={"/a.bin": DATA})) as site:
        yield site


def fetch(*urls: str) -> list[FetchResult]:
    return fetch_assets(urls, backoff_s=0.0)


def test_a_file_is_fetched_once_and_found_by_its_url_for_every_task(site: Site) -> None:
    url = site.address("/a.bin")
    assert find_asset("t", url) is None
    assert fetch(url) == [FetchResult(url, len(DATA), len(DATA))]
    assert fetch(url) == [FetchResult(url, len(DATA), 0)]
    assert len(site.requests) == 1
    for task in ("t", "u"):
        copy = find_asset(task, url)
        assert copy is not None and copy.read_bytes() == DATA


def test_concurrent_calls_fetch_a_file_only_once(site: Site) -> None:
    url = site.address("/a.bin")
    with ThreadPoolExecutor(2) as both:
        fetched = [result for results in both.map(fetch, [url, url]) for result in results]
    assert sorted(result.received_bytes for result in fetched) == [0, len(DATA)]
    assert len(site.requests) == 1


def test_identical_files_of_several_urls_are_stored_once(site: Site) -> None:
    site.files["/b.bin"] = DATA
    urls = [site.address("/a.bin"), site.address("/b.bin")]
    fetch(*urls)
    assert find_asset("t", urls[0]) == find_asset("t", urls[1])
    assert len(list((asset_dir() / "objects").iterdir())) == 1


def test_an_interrupted_transfer_is_resumed(site: Site) -> None:
    site.breaks_after["/a.bin"] = [6 * PIECE, 4 * PIECE]
    (fetched,) = fetch(site.address("/a.bin"))
    assert (fetched.num_bytes, fetched.received_bytes, fetched.error) == (len(DATA), len(DATA), "")
    assert [wanted for _, wanted in site.requests] == [None, f"bytes={6 * PIECE}-", f"bytes={10 * PIECE}-"]
    copy = find_asset("t", fetched.url)
    assert copy is not None and copy.read_bytes() == DATA


def test_a_later_call_resumes_a_failed_transfer(site: Site) -> None:
    url = site.address("/a.bin")
    site.breaks_after["/a.bin"] = [9 * PIECE, 0, 0, 0]
    (failed,) = fetch(url)
    assert failed.error and find_asset("t", url) is None
    assert fetch(url) == [FetchResult(url, len(DATA), len(DATA) - 9 * PIECE)]


@pytest.mark.parametrize("validators", [True, False])
def test_a_file_that_may_have_changed_is_fetched_from_the_beginning(site: Site, validators: bool) -> None:
    site.sends_etags = validators
    site.breaks_after["/a.bin"] = [6 * PIECE, 0, 0, 0]
    assert fetch(site.address("/a.bin"))[0].error
    site.files["/a.bin"] = DATA[::-1]
    (fetched,) = fetch(site.address("/a.bin"))
    copy = find_asset("t", fetched.url)
    assert copy is not None and copy.read_bytes() == DATA[::-1]


def test_a_request_to_a_busy_server_is_repeated(site: Site) -> None:
    site.statuses["/a.bin"] = [503, 429]
    assert fetch(site.address("/a.bin"))[0].error == ""
    assert len(site.requests) == 3


def test_failures_are_reported_with_reasons_and_do_not_affect_other_urls(site: Site) -> None:
    site.files["/login.xlsx"] = b"<html>Sign in</html>"
    site.content_types["/login.xlsx"] = "text/html; charset=utf-8"
    site.statuses["/down"] = [500] * 10
    urls = [site.address(path) for path in ("/none", "/login.xlsx", "/down", "/a.bin")]
    results = fetch(*urls, "ftp://127.0.0.1/a", "http://127.0.0.1:1/a", "http:///a")
    reasons = [result.error for result in results]
    assert reasons[:4] == [
        "the server responded 404 Not Found",
        "the server responded with a web page instead of the file",
        "the server responded 500 Internal Server Error",
        "",
    ]
    assert reasons[4].startswith("invalid URL: ")
    assert reasons[5].startswith("the connection failed: ") and "refused" in reasons[5]
    assert reasons[6].startswith("invalid URL: ")
    assert [find_asset("t", url) is None for url in urls] == [True, True, True, False]


def test_an_unreachable_host_is_retried_for_one_url_only(site: Site) -> None:
    site.statuses = {f"/{number}": [HANG_UP] * 9 for number in range(5)}
    results = fetch_assets([site.address(path) for path in site.statuses], num_workers=1, backoff_s=0.0)
    assert all(result.error.startswith("the connection failed: ") for result in results)
    assert len(site.requests) == 3 + 4


def test_a_truncated_copy_is_ignored_and_fetched_again(site: Site) -> None:
    url = site.address("/a.bin")
    fetch(url)
    copy = find_asset("t", url)
    assert copy is not None
    copy.write_bytes(DATA[:10])
    assert find_asset("t", url) is None
    assert fetch(url) == [FetchResult(url, len(DATA), len(DATA))]


def test_a_cache_of_osworld_is_used_without_conversion(site: Site) -> None:
    url = site.address("/folder/a.bin")
    copy = osworld_cache_path("t", url)
    copy.parent.mkdir(parents=True)
    copy.write_bytes(DATA)
    assert find_asset("t", url) == copy and find_asset("u", url) is None


def write_list(folder: Path, *urls: str) -> Path:
    for number, url in enumerate(urls):
        file = folder / "examples" / "os" / f"t{number}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        steps = [{"type": "download", "parameters": {"files": [{"url": url, "path": "a"}]}}]
        task = {"id": file.stem, "instruction": "-", "config": steps, "evaluator": {"func": "infeasible"}}
        file.write_text(json.dumps(task))
    path = folder / "list.json"
    path.write_text(json.dumps({"os": [f"t{number}" for number in range(len(urls))]}))
    return path


def test_the_command_fetches_all_files_of_a_list(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_list(tmp_path, site.address("/a.bin"), site.address("/a.bin"))
    assert main(["tasks", "fetch", str(path)]) == 0
    output = capsys.readouterr().out
    assert f"{site.url}/a.bin: 1.0 MB\n" in output
    assert "1 file: 0 already cached, 1 fetched (1.0 MB transferred), 0 failed" in output
    assert main(["tasks", "fetch", str(path)]) == 0
    assert "1 file: 1 already cached, 0 fetched (0.0 kB transferred), 0 failed" in capsys.readouterr().out
    assert main(["tasks", "check", str(path)]) == 0
    assert "2 of 2 tasks valid; requirements met for 2" in capsys.readouterr().out


def test_the_command_fails_and_names_the_tasks_if_a_file_cannot_be_fetched(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_list(tmp_path, site.address("/none"), site.address("/a.bin"), site.address("/none"))
    assert main(["tasks", "fetch", str(path)]) == 1
    output = capsys.readouterr().out
    assert f"{site.url}/none: failed: the server responded 404 Not Found (required by t0, t2)" in output
    assert "2 files: 0 already cached, 1 fetched (1.0 MB transferred), 1 failed" in output
