"""What tasks need follows from their files; what is absent, from the asset cache and this machine's programs."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from deskrl.actor.tasks.assets import osworld_path
from deskrl.actor.tasks.files import Task, load_tasks, parse_task, read_task
from deskrl.actor.tasks.needs import Needs, absent_applications, absent_files, absent_programs, task_needs, unsupported
from deskrl.core.errors import UserError

OSWORLD = Path(__file__).parents[3] / "shared" / "osworld" / "evaluation_examples"
needs_osworld = pytest.mark.skipif(not OSWORLD.is_dir(), reason=f"OSWorld's task files are not at {OSWORLD}")

EVALUATOR = {
    "func": "exact_match",
    "result": {"type": "vm_command_line", "command": ["true"]},
    "expected": {"type": "rule", "rules": {"expected": ""}},
}


def task(*steps: tuple[str, dict[str, Any]], **keys: Any) -> Task:
    """A task with these setup steps, and keys of the file that differ."""
    config = [{"type": kind, "parameters": parameters} for kind, parameters in steps]
    raw = {"id": "a", "instruction": "Do it.", "config": config, "evaluator": EVALUATOR} | keys
    return parse_task(json.dumps(raw).encode(), "a.json")


def evaluated(**keys: Any) -> Task:
    """A task with keys of the evaluator that differ."""
    return task(evaluator=EVALUATOR | keys)


def command(command: Any, kind: str = "execute") -> Task:
    """A task with one command."""
    return task((kind, {"command": command}))


def test_a_task_may_need_nothing_but_a_program() -> None:
    assert task_needs(task()) == Needs((), ("true",), (), (), (), (), (), ())


def test_applications_have_one_name_whatever_task_files_call_them() -> None:
    named = task(related_apps=["Chrome", "browser", "libreoffice calc", "Writer", "vscode", "OS", "pdf", "picard"])
    wanted = ("chrome", "libreoffice_calc", "libreoffice_writer", "picard", "vs_code")
    assert task_needs(named).applications == wanted


@pytest.mark.parametrize(
    ("needing", "programs"),
    [
        (command(["gimp", "a.png"], "launch"), {"gimp"}),
        (command("VLC_VERBOSE=-1 vlc --start-time=1 a.mp4", "launch"), {"vlc"}),
        (command("echo {CLIENT_PASSWORD} | sudo -S apt install jq && jq . a"), {"sudo", "jq"}),
        (command(["bash", "-c", "cd Desktop; unzip a.zip"]), {"bash", "unzip"}),
        (command(["python", "-c", "import pyautogui; pyautogui.click(1, 2)"]), {"python"}),
        (command("./setup.sh"), set()),
        (command("echo the code is gimp"), set()),
        (evaluated(result={"type": "vm_command_line", "command": "gsettings get a b"}), {"gsettings"}),
    ],
)
def test_programs_are_what_commands_start(needing: Task, programs: set[str]) -> None:
    assert set(task_needs(needing).programs) - {"true"} == programs


@pytest.mark.parametrize(
    ("needing", "why"),
    [
        (task(proxy=True), ("pages behind a proxy",)),
        (task(("chrome_open_tabs", {"urls_to_open": ["https://a.org/b", "http://a.org"]})), ("opens a.org",)),
        (task(("chrome_open_tabs", {"urls_to_open": ["http://localhost:80/", "file:///home/user/a.html"]})), ()),
        (command(["google-chrome", "https://a.org"], "launch"), ("opens a.org",)),
        (command(["socat", "tcp-listen:9222,fork", "tcp:localhost:1337"], "launch"), ()),
        (command("sudo -S apt-get install -y jq"), ("a command fetches packages or files",)),
        (command(["pip", "install", "pygame"]), ("a command fetches packages or files",)),
        (command("pip install /home/user/a.whl"), ()),
        (command("apt list --installed"), ()),
        (evaluated(expected={"type": "info_from_website", "url": "https://a.org"}), ("getter info_from_website",)),
    ],
)
def test_the_live_web_is_needed_for_a_reason(needing: Task, why: tuple[str, ...]) -> None:
    assert task_needs(needing).network == why


def test_accounts_come_from_setup_steps_and_getters() -> None:
    assert task_needs(task(("login", {"platform": "forum"}))).accounts == ("forum",)
    drive = task(("googledrive", {"operation": ["delete"]}), ("login", {"platform": "googledrive"}))
    assert task_needs(drive).accounts == ("google",)
    assert task_needs(evaluated(result={"type": "googledrive_file", "path": "a"})).accounts == ("google",)


def test_files_are_absent_until_the_asset_cache_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    urls = [f"https://a.org/{name}" for name in "abc"]
    needing = task(
        ("download", {"files": [{"url": urls[0], "path": "a"}]}),
        evaluator=EVALUATOR | {"expected": {"type": "cloud_file", "path": urls[1:], "multi": True}},
    )
    needs = task_needs(needing)
    assert list(needs.files) == list(absent_files(needing, needs)) == urls
    copy = osworld_path(needing.id, urls[0])
    copy.parent.mkdir(parents=True)
    copy.touch()
    assert list(absent_files(needing, needs)) == urls[1:]


def test_steps_getters_and_metrics_that_are_not_built_in_are_named() -> None:
    several = {"type": "vm_file", "path": ["a", "b"], "multi": True}
    needing = task(
        ("update_browse_history", {}),
        evaluator=EVALUATOR | {"func": "compare_table", "result": several, "expected": {"type": "url_dashPart"}},
    )
    needs = task_needs(needing)
    assert needs.setup_steps == ("update_browse_history",)
    assert needs.getters == ("url_dashPart", "vm_file for several files")
    assert needs.metrics == ("compare_table",)
    assert len(unsupported(needing)) == 4


def test_an_infeasible_task_needs_no_evaluator_but_its_setup() -> None:
    needs = task_needs(task(("login", {"platform": "google"}), evaluator={"func": "infeasible"}))
    assert (needs.setup_steps, needs.getters, needs.metrics) == (("login",), (), ())


def test_what_is_installed_here_is_not_absent() -> None:
    needs = Needs(("no-such-app", "xterm"), ("mkdir", "no-such-program"), (), (), (), (), (), ())
    assert absent_applications(needs) == ("no-such-app",)
    assert absent_programs(needs) == ("no-such-program",)


@pytest.mark.parametrize(
    ("needing", "told"),
    [
        (command(3), "task a: execute: command: is no text or list of texts; mend the task file"),
        (task(("launch", {})), "task a: launch: command: is no text"),
        (task(("download", {"files": "a"})), "task a: download: files: is no list of objects"),
        (task(("download", {"files": [{"path": "a"}]})), "task a: download: files.url: is no text"),
        (task(("chrome_open_tabs", {"urls_to_open": [None]})), "task a: chrome_open_tabs: urls_to_open: is no text"),
        (evaluated(expected={"type": "cloud_file"}), "task a: cloud_file: path: is no text"),
    ],
)
def test_a_parameter_of_another_form_is_refused(needing: Task, told: str) -> None:
    with pytest.raises(UserError) as refused:
        task_needs(needing)
    assert str(refused.value).startswith(told)


def test_deskrls_own_tasks_need_nothing_from_outside() -> None:
    for own in load_tasks():
        needs = task_needs(own)
        assert not (needs.network or needs.accounts or needs.files), own.id
        assert unsupported(own) == [], own.id


@needs_osworld
def test_the_needs_of_all_of_osworld() -> None:
    needs = {file.stem: task_needs(read_task(file)) for file in OSWORLD.glob("examples/*/*.json")}
    assert len(needs) == 369
    assert Counter(account for each in needs.values() for account in each.accounts) == {"google": 8}
    assert sum("pages behind a proxy" in each.network for each in needs.values()) == 52
    fetching = ("a command fetches packages or files",)
    assert sum(bool(each.network) and each.network != fetching for each in needs.values()) == 60
    assert sum(len(each.files) for each in needs.values()) == 693
    asked = {name for each in needs.values() for name in each.applications}
    assert asked == {
        *("chrome", "gimp", "libreoffice", "libreoffice_calc", "libreoffice_impress", "libreoffice_writer"),
        *("picard", "terminal", "thunderbird", "vlc", "vs_code"),
    }


@needs_osworld
def test_noise_takes_no_file_away_and_adds_its_messages() -> None:
    for file in OSWORLD.glob("examples_noisy/*/*.json"):
        plain = OSWORLD / "examples" / file.parent.name / file.name.replace("_noise", "")
        with_noise, without = task_needs(read_task(file)), task_needs(read_task(plain))
        assert set(without.files) <= set(with_noise.files), file.name
        assert "notify-send" in set(with_noise.programs) - set(without.programs), file.name
