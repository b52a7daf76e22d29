"""The asset cache: files are fetched once, gone on with where they broke off, and told with their reason if not had."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from files_kit import HANGS_UP, Site, serving

from deskrl.actor.tasks.asset_fetch import Fetched, fetch_assets
from deskrl.actor.tasks.assets import asset_folder, find_asset, osworld_path
from deskrl.core.cli import main

DATA = os.urandom(1_000_000)
PIECE = 65_536
"""What is written at a time; the rest of one that breaks off is lost."""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(Site(files={"/a.bin": DATA})) as site:
        yield site


def fetch(*urls: str) -> list[Fetched]:
    return fetch_assets(urls, pause_s=0.0)


def test_a_file_is_fetched_once_and_found_by_its_address_whatever_the_task(site: Site) -> None:
    url = site.address("/a.bin")
    assert find_asset("t", url) is None
    assert fetch(url) == [Fetched(url, len(DATA), len(DATA))]
    assert fetch(url) == [Fetched(url, len(DATA), 0)]
    assert len(site.asked) == 1
    for task in ("t", "u"):
        copy = find_asset(task, url)
        assert copy is not None and copy.read_bytes() == DATA


def test_two_who_want_the_same_file_at_once_fetch_it_once(site: Site) -> None:
    url = site.address("/a.bin")
    with ThreadPoolExecutor(2) as both:
        fetched = [result for results in both.map(fetch, [url, url]) for result in results]
    assert sorted(result.received_bytes for result in fetched) == [0, len(DATA)]
    assert len(site.asked) == 1


def test_equal_files_of_several_addresses_are_kept_once(site: Site) -> None:
    site.files["/b.bin"] = DATA
    urls = [site.address("/a.bin"), site.address("/b.bin")]
    fetch(*urls)
    assert find_asset("t", urls[0]) == find_asset("t", urls[1])
    assert len(list((asset_folder() / "objects").iterdir())) == 1


def test_a_transfer_that_breaks_off_goes_on_from_where_it_was(site: Site) -> None:
    site.breaks_after["/a.bin"] = [6 * PIECE, 4 * PIECE]
    (fetched,) = fetch(site.address("/a.bin"))
    assert (fetched.num_bytes, fetched.received_bytes, fetched.error) == (len(DATA), len(DATA), "")
    assert [wanted for _, wanted in site.asked] == [None, f"bytes={6 * PIECE}-", f"bytes={10 * PIECE}-"]
    copy = find_asset("t", fetched.url)
    assert copy is not None and copy.read_bytes() == DATA


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(site: Site) -> None:
    url = site.address("/a.bin")
    site.breaks_after["/a.bin"] = [9 * PIECE, 0, 0, 0]
    (given_up,) = fetch(url)
    assert given_up.error and find_asset("t", url) is None
    assert fetch(url) == [Fetched(url, len(DATA), len(DATA) - 9 * PIECE)]


@pytest.mark.parametrize("validators", [True, False])
def test_a_file_that_changed_meanwhile_or_may_have_is_fetched_anew(site: Site, validators: bool) -> None:
    site.validators = validators
    site.breaks_after["/a.bin"] = [6 * PIECE, 0, 0, 0]
    assert fetch(site.address("/a.bin"))[0].error
    site.files["/a.bin"] = DATA[::-1]
    (fetched,) = fetch(site.address("/a.bin"))
    copy = find_asset("t", fetched.url)
    assert copy is not None and copy.read_bytes() == DATA[::-1]


def test_a_server_that_is_busy_is_asked_again(site: Site) -> None:
    site.statuses["/a.bin"] = [503, 429]
    assert fetch(site.address("/a.bin"))[0].error == ""
    assert len(site.asked) == 3


def test_what_cannot_be_had_is_told_with_its_reason_and_holds_nothing_up(site: Site) -> None:
    site.files["/login.xlsx"] = b"<html>Sign in</html>"
    site.types["/login.xlsx"] = "text/html; charset=utf-8"
    site.statuses["/down"] = [500] * 10
    urls = [site.address(path) for path in ("/none", "/login.xlsx", "/down", "/a.bin")]
    results = fetch(*urls, "ftp://127.0.0.1/a", "http://127.0.0.1:1/a", "http:///a")
    reasons = [result.error for result in results]
    assert reasons[:4] == [
        "the server answers 404 Not Found",
        "the server answers with a web page in place of the file",
        "the server answers 500 Internal Server Error",
        "",
    ]
    assert reasons[4].startswith("is no address that can be fetched: ")
    assert reasons[5].startswith("the connection fails: ") and "refused" in reasons[5]
    assert reasons[6].startswith("is no address that can be fetched: ")
    assert [find_asset("t", url) is None for url in urls] == [True, True, True, False]


def test_a_host_that_gives_no_answer_is_asked_often_enough_once_and_not_for_every_address(site: Site) -> None:
    site.statuses = {f"/{number}": [HANGS_UP] * 9 for number in range(5)}
    results = fetch_assets([site.address(path) for path in site.statuses], num_at_once=1, pause_s=0.0)
    assert all(result.error.startswith("the connection fails: ") for result in results)
    assert len(site.asked) == 3 + 4


def test_a_copy_that_lost_bytes_is_none_and_is_fetched_again(site: Site) -> None:
    url = site.address("/a.bin")
    fetch(url)
    copy = find_asset("t", url)
    assert copy is not None
    copy.write_bytes(DATA[:10])
    assert find_asset("t", url) is None
    assert fetch(url) == [Fetched(url, len(DATA), len(DATA))]


def test_a_cache_of_osworlds_is_taken_as_it_is(site: Site) -> None:
    url = site.address("/folder/a.bin")
    copy = osworld_path("t", url)
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


def test_the_command_fetches_what_a_list_names_and_then_it_needs_nothing(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_list(tmp_path, site.address("/a.bin"), site.address("/a.bin"))
    assert main(["tasks", "fetch", str(path)]) == 0
    told = capsys.readouterr().out
    assert f"{site.url}/a.bin: 1.0 MB\n" in told
    assert "1 file: 0 were there, 1 fetched (1.0 MB transferred), 0 failed" in told
    assert main(["tasks", "fetch", str(path)]) == 0
    assert "1 file: 1 were there, 0 fetched (0.0 kB transferred), 0 failed" in capsys.readouterr().out
    assert main(["tasks", "check", str(path)]) == 0
    assert "nothing is known to be absent here for 2 of them" in capsys.readouterr().out


def test_the_command_fails_if_a_file_cannot_be_had_and_says_who_needs_it(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_list(tmp_path, site.address("/none"), site.address("/a.bin"), site.address("/none"))
    assert main(["tasks", "fetch", str(path)]) == 1
    told = capsys.readouterr().out
    assert f"{site.url}/none: failed: the server answers 404 Not Found (needed by t0, t2)" in told
    assert "2 files: 0 were there, 1 fetched (1.0 MB transferred), 1 failed" in told
