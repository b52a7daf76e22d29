"""Specification of task requirements: derivation from task files, and lookup of files and programs."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from asset_cache_kit import osworld_cache_path

from deskrl.actor.task import Task
from deskrl.actor.tasks.assets import cloud_file_names, find_asset, url_key
from deskrl.actor.tasks.evaluators import GETTERS
from deskrl.actor.tasks.parameter_schemas import GETTER_SCHEMAS, STEP_SCHEMAS
from deskrl.actor.tasks.requirements import (
    Requirements,
    missing_applications,
    missing_capabilities,
    missing_files,
    missing_local_files,
    missing_programs,
    task_requirements,
    unsupported_reasons,
)
from deskrl.actor.tasks.setup_steps import STEPS
from deskrl.actor.tasks.task_schema import load_tasks, parse_task, read_task
from deskrl.core.errors import UserError

OSWORLD = Path(__file__).parents[3] / "shared" / "osworld" / "evaluation_examples"
needs_osworld = pytest.mark.skipif(not OSWORLD.is_dir(), reason=f"{OSWORLD}: not found")

EVALUATOR = {
    "func": "exact_match",
    "result": {"type": "vm_command_line", "command": ["true"]},
    "expected": {"type": "rule", "rules": {"expected": ""}},
}

INFO_FROM_WEBSITE = {"type": "info_from_website", "url": "https://a.org", "infos": []}
EXPECTED_URLS = {"type": "rule", "rules": {"urls": [["https://a.org/b", "chrome://settings"], "http://[", "a"]}}
DOWNLOAD = ("a command fetches packages or files",)


def task(*steps: tuple[str, dict[str, Any]], **keys: Any) -> Task:
    """Return a task with these setup steps and other changed keys."""
    config = [{"type": kind, "parameters": parameters} for kind, parameters in steps]
    raw = {"id": "a", "instruction": "Do it.", "config": config, "evaluator": EVALUATOR} | keys
    return parse_task(json.dumps(raw).encode(), "a.json")


def evaluated(**keys: Any) -> Task:
    """Return a task with changed keys of the evaluator."""
    return task(evaluator=EVALUATOR | keys)


def command(command: Any, kind: str = "execute") -> Task:
    """Return a task with one setup step that runs a command."""
    return task((kind, {"command": command}))


def test_a_task_may_require_only_a_program() -> None:
    assert task_requirements(task()) == Requirements((), ("true",), (), (), (), (), (), ())


def test_application_names_are_canonical() -> None:
    named = task(related_apps=["Chrome", "browser", "libreoffice calc", "Writer", "vscode", "OS", "pdf", "picard"])
    wanted = ("chrome", "libreoffice_calc", "libreoffice_writer", "picard", "vs_code")
    assert task_requirements(named).applications == wanted


@pytest.mark.parametrize(
    ("example", "programs"),
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
def test_programs_are_derived_from_commands(example: Task, programs: set[str]) -> None:
    assert set(task_requirements(example).programs) - {"true"} == programs


@pytest.mark.parametrize(
    ("example", "reasons"),
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
        (evaluated(expected=INFO_FROM_WEBSITE), ("getter info_from_website",)),
        (evaluated(result={"type": "vm_command_line", "command": "curl a.org"}), DOWNLOAD),
        (evaluated(result={"type": "vm_command_line", "command": "which spotify"}), ("the policy installs a program",)),
        (task(("proxy", {})), ("setup step proxy",)),
        (evaluated(result={"type": "bookmarks"}, expected=EXPECTED_URLS), ("expects a page of a.org",)),
        (evaluated(expected=EXPECTED_URLS), ()),
    ],
)
def test_network_requirements_have_reasons(example: Task, reasons: tuple[str, ...]) -> None:
    assert task_requirements(example).network == reasons


def test_accounts_are_derived_from_setup_steps_and_getters() -> None:
    assert task_requirements(task(("login", {"platform": "forum", "settings_file": "a.json"}))).accounts == ("forum",)
    drive = task(
        ("googledrive", {"operation": ["delete"], "args": [{}], "settings_file": "b.json"}),
        ("login", {"platform": "googledrive", "settings_file": "a.json"}),
    )
    assert task_requirements(drive).accounts == ("google",)
    assert task_requirements(drive).local_files == ("a.json", "b.json")
    getter = {"type": "googledrive_file", "path": "a", "settings_file": "a.json", "dest": "a"}
    assert task_requirements(evaluated(result=getter)).accounts == ("google",)


def test_files_are_missing_until_they_are_in_the_asset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    urls = [f"https://a.org/{name}" for name in "abc"]
    example = task(
        ("download", {"files": [{"url": urls[0], "path": "a"}]}),
        evaluator=EVALUATOR | {"expected": {"type": "cloud_file", "path": urls[1:], "multi": True}},
    )
    required = task_requirements(example)
    assert list(required.files) == list(missing_files(example, required)) == urls
    copy = osworld_cache_path(example.id, urls[0])
    copy.parent.mkdir(parents=True)
    copy.touch()
    assert list(missing_files(example, required)) == urls[1:]


def write_copied_cache(cache: Path, example: Task) -> None:
    """Write files under the names that OSWorld's client gives them in its cache."""
    folder = cache / "deskrl" / "assets" / example.id
    for step in (*example.config, *example.evaluator.postconfig):
        for file in step.parameters.get("files", []) if step.type == "download" else []:
            name = f"{url_key(file['url'])}_{file['path'].rsplit('/', 1)[-1]}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(file["url"])
    for item in (item for check in example.evaluator.checks for item in check.items):
        if item.type == "cloud_file":
            paths, names = item.parameters["path"], item.parameters["dest"]
            for url, name in zip(*([x] if isinstance(x, str) else x for x in (paths, names)), strict=True):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(url)


def test_copies_of_osworlds_cache_are_found_under_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    example = task(
        ("download", {"files": [{"url": "https://a.org/b?download=true", "path": "/home/user/other name.txt"}]}),
        evaluator=EVALUATOR
        | {
            "result": {"type": "vm_file", "path": "/home/user/x", "dest": "shared.txt"},
            "expected": {
                "type": "cloud_file",
                "path": [f"https://a.org/{name}" for name in "cdef"],
                "dest": ["gold.txt", "shared.txt", "../e", "folder/f"],
                "multi": True,
            },
        },
    )
    write_copied_cache(tmp_path, example)
    assert cloud_file_names(example) == {"https://a.org/c": "gold.txt", "https://a.org/f": "folder/f"}
    missing = ("https://a.org/d", "https://a.org/e")  # a name that two files share, and one outside the directory
    assert missing_files(example, task_requirements(example)) == missing
    found = find_asset(example.id, "https://a.org/c", "gold.txt")
    assert found is not None and found.read_text() == "https://a.org/c"


@needs_osworld
def test_a_copied_cache_has_all_files_of_all_osworld_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    missing = {}
    for file in OSWORLD.glob("examples/*/*.json"):
        example = read_task(file)
        write_copied_cache(tmp_path, example)
        required = task_requirements(example)
        copied_as = cloud_file_names(example)
        found = {url: find_asset(example.id, url, copied_as.get(url)) for url in required.files}
        assert all(path is None or path.read_text() == url for url, path in found.items())
        if missing_files(example, required):
            missing[example.id] = len(missing_files(example, required))
    assert missing == {"74d5859f-ed66-4d3e-aa0e-93d7a592ce41": 4}  # OSWorld stores the results under the same names


def test_unknown_setup_steps_getters_and_metrics_are_listed() -> None:
    several = {"type": "vm_file", "path": ["a", "b"], "multi": True}
    example = task(
        ("update_browse_history", {"history": []}),
        evaluator=EVALUATOR | {"func": "compare_table", "result": several, "expected": {"type": "bookmarks"}},
    )
    required = task_requirements(example)
    assert required.setup_steps == ("update_browse_history",)
    assert required.getters == ("bookmarks", "vm_file for several files")
    assert required.metrics == ("compare_table",)
    assert len(unsupported_reasons(example)) == 4


def test_an_infeasible_task_requires_its_setup_but_no_evaluator() -> None:
    required = task_requirements(task(("open", {"path": "a"}), ("tidy_desktop", {}), evaluator={"func": "infeasible"}))
    assert (required.setup_steps, required.getters, required.metrics) == (("tidy_desktop",), (), ())


def test_installed_applications_and_programs_are_not_missing() -> None:
    required = Requirements(("no-such-app", "xterm"), ("mkdir", "no-such-program"), (), (), (), (), (), ())
    assert missing_applications(required) == ("no-such-app",)
    assert missing_programs(required) == ("no-such-program",)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (command(3), "task a: execute: command: must be a string or an array of strings (hint: correct the task file)"),
        (task(("launch", {})), "task a: launch: command: must be a string"),
        (task(("download", {"files": "a"})), "task a: download: files: must be an array of objects"),
        (task(("download", {"files": [{"path": "a"}]})), "task a: download: files.url: must be a string"),
        (task(("chrome_open_tabs", {"urls_to_open": [None]})), "task a: chrome_open_tabs: urls_to_open: must be"),
        (evaluated(expected={"type": "cloud_file"}), "task a: cloud_file: path: must be a string"),
        (task(("sleep", {})), "task a: sleep: seconds: must be a number of at least 0, but is missing"),
        (task(("sleep", {"seconds": "3"})), "task a: sleep: seconds: must be a number of at least 0"),
        (task(("sleep", {"seconds": -1})), "task a: sleep: seconds: must be a number of at least 0"),
        (task(("open", {})), "task a: open: path: must be a string, but is missing"),
        (task(("activate_window", {"name": "a"})), "task a: activate_window: window_name: must be a string"),
        (task(("close_window", {"window_name": "a", "strict": "yes"})), "task a: close_window: strict: must be a bool"),
        (task(("chrome_close_tabs", {})), "task a: chrome_close_tabs: urls_to_close: must be an array of strings"),
        (task(("upload_file", {})), "task a: upload_file: files: must be an array of objects, but is missing"),
        (task(("upload_file", {"files": [{"path": "a"}]})), "task a: upload_file: files: must contain exactly one of"),
        (task(("upload_file", {"files": [{"content": "a"}]})), "task a: upload_file: files.path: must be a string"),
        (task(("execute", {"command": []})), "task a: execute: command: must be a string"),
        (task(("execute", {"command": "a", "until": "b"})), "task a: execute: until: must be an object"),
        (task(("execute_with_verification", {"command": "a", "max_wait_time": "b"})), "task a: execute_with_verif"),
        (task(("download", {"files": [{"path": "a", "url": "https://[a"}]})), "task a: download: files.url: must be"),
        (task(("login", {"platform": "a"})), "task a: login: settings_file: must be a string, but is missing"),
        (evaluated(postconfig=[{"type": "sleep", "parameters": {}}]), "task a: sleep: seconds: must be a number"),
        (evaluated(result={"type": "vm_command_line"}), "task a: vm_command_line: command: must be a string"),
        (evaluated(result={"type": "vm_file", "path": 3}), "task a: vm_file: path: must be a string"),
        (evaluated(result={"type": "vlc_config"}), "task a: vlc_config: dest: must be a string, but is missing"),
        (evaluated(expected={"type": "rule"}), "task a: rule: rules: must be a value, but is missing"),
    ],
)
def test_a_malformed_parameter_is_an_error(example: Task, message: str) -> None:
    with pytest.raises(UserError) as caught:
        task_requirements(example)
    assert str(caught.value).startswith(message)


def test_every_built_in_setup_step_and_getter_has_a_schema() -> None:
    assert set(STEPS) <= set(STEP_SCHEMAS)
    assert set(GETTERS) <= set(GETTER_SCHEMAS)


def test_a_local_file_that_a_setup_step_uploads_is_missing_until_it_exists(tmp_path: Path) -> None:
    files = [{"path": "a", "local_path": str(tmp_path / "a")}, {"path": "b", "content": "b"}]
    example = task(("upload_file", {"files": files}))
    required = task_requirements(example)
    assert missing_local_files(required) == required.local_files == (str(tmp_path / "a"),)
    assert unsupported_reasons(example) == [f"{tmp_path}/a: not found"]
    (tmp_path / "a").touch()
    assert missing_local_files(required) == ()


@pytest.mark.parametrize(
    ("example", "capabilities"),
    [
        (command("echo {CLIENT_PASSWORD} | sudo -S mkdir a"), ("root privileges",)),
        (command(["bash", "-c", "sudo useradd charles"]), ("root privileges",)),
        (command("apt-get -y install jq"), ("root privileges",)),
        (command("apt list --installed"), ()),
        (command("timedatectl status"), ()),
        (command("timedatectl set-timezone UTC"), ("root privileges",)),
        (command("gio trash /home/user/a.webp"), ("trash",)),
        (command("rm -r ~/.local/share/Trash/files"), ("trash",)),
        (command("echo the trash is full"), ()),
        (task(("change_wallpaper", {"path": "a"})), ("wallpaper",)),
        (task(("proxy", {})), ("root privileges",)),
        (evaluated(postconfig=[{"type": "execute", "parameters": {"command": "sudo ls"}}]), ("root privileges",)),
        (evaluated(result={"type": "vm_command_line", "command": "gio list trash:///"}), ("trash",)),
        (evaluated(result={"type": "vm_file", "path": "/home/user/.local/share/Trash/info/a"}), ("trash",)),
        (evaluated(result={"type": "vm_command_line", "command": "which spotify"}), ("root privileges",)),
        (evaluated(result={"type": "vm_command_line", "command": ["timedatectl", "status"]}), ("root privileges",)),
        (command("gsettings set org.gnome.desktop.session idle-delay 0"), ("GNOME settings",)),
        (evaluated(result={"type": "accessibility_tree"}), ("accessibility tree",)),
        (evaluated(result={"type": "vm_terminal_output"}), ("text of the terminal",)),
        (evaluated(result={"type": "vm_wallpaper", "dest": "a"}), ("wallpaper",)),
    ],
)
def test_capabilities_of_the_desktop_are_derived_from_steps_and_getters(
    example: Task, capabilities: tuple[str, ...]
) -> None:
    required = task_requirements(example)
    assert required.capabilities == capabilities
    assert set(missing_capabilities(required)) >= set(capabilities) - {"trash"}


def test_deskrls_own_suite_requires_no_network_accounts_or_files() -> None:
    for own in load_tasks():
        required = task_requirements(own)
        assert not (required.network or required.accounts or required.files or required.capabilities), own.id
        assert unsupported_reasons(own) == [], own.id


@needs_osworld
def test_requirements_of_all_osworld_tasks() -> None:
    required = {file.stem: task_requirements(read_task(file)) for file in OSWORLD.glob("examples/*/*.json")}
    assert len(required) == 369
    assert Counter(account for each in required.values() for account in each.accounts) == {"google": 8}
    assert sum("pages behind a proxy" in each.network for each in required.values()) == 52
    download = ("a command fetches packages or files",)
    assert sum(bool(each.network) and each.network != download for each in required.values()) == 64
    assert sum(len(each.files) for each in required.values()) == 693
    assert Counter(name for each in required.values() for name in each.capabilities) == {
        "GNOME settings": 6,
        "accessibility tree": 15,
        "root privileges": 12,
        "text of the terminal": 2,
        "trash": 1,
        "wallpaper": 2,
    }
    applications = {name for each in required.values() for name in each.applications}
    assert applications == {
        *("chrome", "gimp", "libreoffice", "libreoffice_calc", "libreoffice_impress", "libreoffice_writer"),
        *("picard", "terminal", "thunderbird", "vlc", "vs_code"),
    }


@needs_osworld
def test_noisy_osworld_tasks_require_the_same_files_and_notify_send() -> None:
    for file in OSWORLD.glob("examples_noisy/*/*.json"):
        plain = OSWORLD / "examples" / file.parent.name / file.name.replace("_noise", "")
        with_noise, without = task_requirements(read_task(file)), task_requirements(read_task(plain))
        assert set(without.files) <= set(with_noise.files), file.name
        assert "notify-send" in set(with_noise.programs) - set(without.programs), file.name
