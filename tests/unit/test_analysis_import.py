"""Import of OSWorld's results, AgentNet's files and deskrl's demonstrations, and the counts of what is left out."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.demonstrations import Demonstration, Player, find_demonstrations, read_demonstration, read_screenshot
from deskrl.analysis.datasets.import_data import Format, Source, import_episodes, recognise_format
from deskrl.cli.main import main
from deskrl.core.errors import UserError
from deskrl.core.left_out import LeftOut

SIZE = (200, 100)
NOT_AN_ACTION = "its action is none that deskrl has"


def picture(colour: str = "navy", size: tuple[int, int] = SIZE, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def imported(source: Source, out: Path) -> tuple[list[Demonstration], LeftOut]:
    """Import and return the demonstrations as they are read back."""
    left_out = LeftOut()
    numbers = import_episodes(source, out, left_out)
    found = [read_demonstration(folder) for folder in find_demonstrations(out)]
    assert numbers == (len(found), sum(len(one.steps) for one in found))
    return found, left_out


def agentnet(folder: Path, *codes: str, **values: Any) -> Source:
    """Write an AgentNet file with one episode, whose steps have these codes."""
    (folder / "ubuntu_images").mkdir(parents=True)
    for index in range(len(codes)):
        (folder / "ubuntu_images" / f"shot-{index}.png").write_bytes(picture())
    record = {
        "task_id": "2024/sort",
        "instruction": "Sort the table.",
        "task_completed": True,
        "traj": [
            {"index": index, "image": f"shot-{index}.png", "value": {"thought": f"Thought {index}", "code": code}}
            for index, code in enumerate(codes)
        ],
    } | values
    (folder / "agentnet.jsonl").write_text(json.dumps(record) + "\n")
    return Source(folder)


def osworld(folder: Path, *lines: dict[str, Any], initial: bool = True, score: str = "1.0\n") -> tuple[Source, Path]:
    """Write the results of one episode of OSWorld; returns also its folder."""
    episode = folder / "results" / "os" / "task-1"
    episode.mkdir(parents=True)
    if initial:
        (episode / "initial_state.png").write_bytes(picture("black"))
    records = []
    for number, line in enumerate(lines, start=1):
        name = f"step_{number}_20261201@000000.png"
        (episode / name).write_bytes(picture(f"#0000{number:02d}"))
        records.append({"step_num": number, "screenshot_file": name} | line)
    (episode / "traj.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (episode / "result.txt").write_text(score)
    tasks = folder / "examples"
    (tasks / "os").mkdir(parents=True)
    (tasks / "os" / "task-1.json").write_text(json.dumps({"id": "task-1", "instruction": "Open the terminal."}))
    return Source(folder / "results", tasks=tasks), episode


def computer_13(kind: str, **parameters: Any) -> dict[str, Any]:
    """Return an action of OSWorld's action space computer_13."""
    return {"action_type": kind, "parameters": parameters}


def actions(demonstration: Demonstration) -> list[Action]:
    return [step.action for step in demonstration.steps]


def test_an_episode_of_agentnet_becomes_a_demonstration_in_pixels(tmp_path: Path) -> None:
    source = agentnet(
        tmp_path / "in",
        "pyautogui.click(x=0.5, y=0.25)",
        "pyautogui.write(message='x=0.5')",
        "pyautogui.moveTo(x=0, y=0)\npyautogui.dragTo(x=1.0, y=1.0, button='left')",
        "computer.terminate(status='success')",
    )
    (found,), left_out = imported(source, tmp_path / "out")
    assert actions(found) == [
        Action(ActionKind.CLICK, x=100, y=25),
        Action(ActionKind.TYPE, text="x=0.5"),
        Action(ActionKind.DRAG, end_x=199, end_y=99),
        Action(ActionKind.FINISHED),
    ]
    assert (found.task_id, found.instruction, found.reward, found.screen_size) == (
        "2024/sort",
        "Sort the table.",
        1.0,
        SIZE,
    )
    assert (found.source, found.termination, found.fault) == ("AgentNet", "finished", "")
    assert [(step.thought, step.player) for step in found.steps[:2]] == [
        ("Thought 0", Player.PERSON),
        ("Thought 1", Player.PERSON),
    ]
    assert left_out.reasons("step") == {}


def test_screenshots_are_copied_byte_by_byte_and_other_formats_become_png(tmp_path: Path) -> None:
    source = agentnet(tmp_path / "in", "pyautogui.press('a')", "pyautogui.press('b')")
    (tmp_path / "in" / "ubuntu_images" / "shot-1.png").write_bytes(picture(kind="JPEG"))
    (found,), _ = imported(source, tmp_path / "out")
    (folder,) = find_demonstrations(tmp_path / "out")
    first, second = (read_screenshot(folder, found, step.screenshot) for step in found.steps)
    assert first == picture()
    assert second.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("pyautogui.click(x=1.5, y=0.5)", NOT_AN_ACTION),
        ("pyautogui.click(x=0.1, y=0.1)\npyautogui.write('a')", NOT_AN_ACTION),
        ("__import__('os').system('true')", NOT_AN_ACTION),
        ("pyautogui.mouseDown()", NOT_AN_ACTION),
        ("", "it has no code"),
    ],
)
def test_a_step_that_is_no_action_is_left_out_and_named(tmp_path: Path, code: str, reason: str) -> None:
    source = agentnet(tmp_path / "in", "pyautogui.press('a')", code, "pyautogui.press('b')")
    (found,), left_out = imported(source, tmp_path / "out")
    assert [action.keys for action in actions(found)] == [("a",), ("b",)]
    assert left_out.reasons("step") == {reason: 1}
    (row,) = left_out.examples("step", reason)
    assert row.startswith("agentnet.jsonl:1 step 1")


def test_a_step_that_agentnet_marks_as_incorrect_is_left_out(tmp_path: Path) -> None:
    source = agentnet(tmp_path / "in", "pyautogui.press('a')", "pyautogui.press('b')")
    record = json.loads((tmp_path / "in" / "agentnet.jsonl").read_text())
    record["traj"][0]["value"]["last_step_correct"] = False
    (tmp_path / "in" / "agentnet.jsonl").write_text(json.dumps(record))
    (found,), left_out = imported(source, tmp_path / "out")
    assert [action.keys for action in actions(found)] == [("b",)]
    assert left_out.reasons("step") == {"AgentNet marks it as incorrect": 1}


def test_an_action_without_a_point_is_where_the_pointer_was_unless_that_step_was_left_out(tmp_path: Path) -> None:
    scroll = "pyautogui.scroll(-3)"
    known = agentnet(tmp_path / "known", "pyautogui.moveTo(x=0.1, y=0.1)", scroll)
    (found,), _ = imported(known, tmp_path / "out")
    assert actions(found)[1] == Action(ActionKind.SCROLL, x=20, y=10, scroll_y=3)
    unknown = agentnet(tmp_path / "unknown", "pyautogui.press('a')", "pyautogui.mouseDown()", scroll)
    (found,), left_out = imported(unknown, tmp_path / "out-2")
    assert len(found.steps) == 1
    assert left_out.reasons("step") == {NOT_AN_ACTION: 1, "its point depends on a step that was left out": 1}


def test_steps_after_the_end_of_an_episode_are_left_out(tmp_path: Path) -> None:
    source = agentnet(tmp_path / "in", "computer.terminate(status='failure')", "pyautogui.press('a')")
    (found,), left_out = imported(source, tmp_path / "out")
    assert found.termination == "infeasible"
    assert left_out.reasons("step") == {"it follows the action that ends the episode": 1}


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "link.png", "a\0b", "a" * 5000])
def test_a_screenshot_outside_the_folder_is_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(picture())
    source = agentnet(tmp_path / "in", "pyautogui.press('a')", "pyautogui.press('b')")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")
    file = tmp_path / "in" / "agentnet.jsonl"
    record = json.loads(file.read_text())
    record["traj"][0]["image"] = name
    file.write_text(json.dumps(record))
    (found,), left_out = imported(source, tmp_path / "out")
    assert len(found.steps) == 1
    (reason,) = left_out.reasons("step")
    assert reason in (
        "the path of its screenshot leaves the folder",
        "its screenshot does not exist",
        "its screenshot cannot be read",
    )


def test_damaged_screenshots_and_other_sizes_are_left_out(tmp_path: Path) -> None:
    source = agentnet(tmp_path / "in", *["pyautogui.press('a')"] * 4)
    images = tmp_path / "in" / "ubuntu_images"
    (images / "shot-1.png").write_bytes(picture()[:-20])
    (images / "shot-2.png").write_bytes(picture(size=(100, 100)))
    (images / "shot-3.png").unlink()
    (found,), left_out = imported(source, tmp_path / "out")
    assert len(found.steps) == 1
    assert left_out.reasons("step") == {
        "its screenshot cannot be decoded": 1,
        "its screenshot has another size than the first": 1,
        "its screenshot does not exist": 1,
    }


def test_damaged_lines_and_episodes_are_counted(tmp_path: Path) -> None:
    source = agentnet(tmp_path / "in", "pyautogui.press('a')")
    file = tmp_path / "in" / "agentnet.jsonl"
    good = file.read_text()
    bad = ['{"task_id": ', "[1]", '{"instruction": "x"}', '{"traj": []}', "[" * 100_000]
    file.write_text("\n".join([*bad, "", good]))
    found, left_out = imported(source, tmp_path / "out")
    assert len(found) == 1
    assert left_out.reasons("line") == {"it is not valid JSON": 2, "it is not a JSON object": 1}
    assert left_out.reasons("episode") == {"it has no traj": 1, "it has no instruction": 1}


def test_an_episode_that_json_cannot_carry_is_left_out(tmp_path: Path) -> None:
    source, _ = osworld(tmp_path, {"action": "DONE"})
    other = tmp_path / "results" / "os" / "task-2"
    shutil.copytree(tmp_path / "results" / "os" / "task-1", other)
    task = {"id": "task-2", "instruction": "Open it.", "limit": float("nan")}
    (tmp_path / "examples" / "os" / "task-2.json").write_text(json.dumps(task))
    found, left_out = imported(source, tmp_path / "out")
    assert [one.task_id for one in found] == ["task-1"]
    assert left_out.reasons("episode") == {"it cannot be stored as a demonstration": 1}


def test_an_action_of_osworld_belongs_to_the_screenshot_before_it(tmp_path: Path) -> None:
    source, _ = osworld(
        tmp_path,
        {"action": "pyautogui.click(20, 10)", "response": "Thought: I click.\nAction: click(20, 10)"},
        {"action": "DONE"},
    )
    (found,), left_out = imported(source, tmp_path / "out")
    (folder,) = find_demonstrations(tmp_path / "out")
    assert actions(found) == [Action(ActionKind.CLICK, x=20, y=10), Action(ActionKind.FINISHED)]
    shots = [read_screenshot(folder, found, step.screenshot) for step in found.steps]
    assert shots == [picture("black"), picture("#000001")]
    assert (found.task_id, found.application, found.instruction) == ("task-1", "os", "Open the terminal.")
    assert (found.reward, found.task["id"], found.steps[0].thought) == (1.0, "task-1", "I click.")
    assert left_out.reasons("step") == {}


def test_a_first_action_without_a_screenshot_before_it_is_left_out(tmp_path: Path) -> None:
    source, _ = osworld(tmp_path, {"action": "pyautogui.press('a')"}, {"action": "DONE"}, initial=False)
    (found,), left_out = imported(source, tmp_path / "out")
    assert actions(found) == [Action(ActionKind.FINISHED)]
    assert left_out.reasons("step") == {"no screenshot shows the screen before the action": 1}


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("WAIT", Action(ActionKind.WAIT, seconds=1.0)),
        ("FAIL", Action(ActionKind.INFEASIBLE)),
        (
            "import pyautogui\nimport time\n'''\nThought:\nI click.\n'''\n\npyautogui.click(5, 6)\ntime.sleep(1)",
            Action(ActionKind.CLICK, x=5, y=6),
        ),
        (
            "import pyperclip\npyperclip.copy('Größe (1)')\npyautogui.hotkey('ctrl', 'v')\ntime.sleep(0.5)",
            Action(ActionKind.TYPE, text="Größe (1)"),
        ),
        ("import time\ntime.sleep(2)", Action(ActionKind.WAIT, seconds=2.0)),
        ({"action_type": "tool_use", "command": "pyautogui.press('a')"}, Action(ActionKind.HOTKEY, keys=("a",))),
        ({"action_space": "pyautogui", "action": "pyautogui.press('a')"}, Action(ActionKind.HOTKEY, keys=("a",))),
        ({"action_type": "DONE"}, Action(ActionKind.FINISHED)),
        (computer_13("CLICK", x=5, y=6, num_clicks=2), Action(ActionKind.DOUBLE_CLICK, x=5, y=6)),
        ({"action_type": "CLICK", "x": 5, "y": 6, "button": "right"}, Action(ActionKind.RIGHT_CLICK, x=5, y=6)),
        (computer_13("SCROLL", dx=0, dy=-4), Action(ActionKind.SCROLL, x=100, y=50, scroll_y=4)),
        (computer_13("SCROLL", dx=3, dy=0), Action(ActionKind.SCROLL, x=100, y=50, scroll_x=3)),
        (computer_13("TYPING", text="it's"), Action(ActionKind.TYPE, text="it's")),
        (computer_13("HOTKEY", keys=["ctrl", "c"]), Action(ActionKind.HOTKEY, keys=("ctrl", "c"))),
    ],
)
def test_the_forms_of_osworlds_actions_are_read(tmp_path: Path, action: Any, expected: Action) -> None:
    source, _ = osworld(tmp_path, {"action": action})
    (found,), left_out = imported(source, tmp_path / "out")
    assert actions(found) == [expected]
    assert left_out.reasons("step") == {}


@pytest.mark.parametrize(
    "action",
    [
        computer_13("MOUSE_DOWN"),
        computer_13("SCROLL", dx=1, dy=1),
        computer_13("TYPING", **{"text": "x", "a=b, c": 1, "os": {"x": 1}}),
        {"action_type": ["CLICK"]},
        "pyautogui.click(200, 10)",
        {"step": 1},
        7,
        None,
    ],
)
def test_other_forms_of_osworlds_actions_are_left_out(tmp_path: Path, action: Any) -> None:
    source, _ = osworld(tmp_path, {"action": action}, {"action": "DONE"})
    (found,), left_out = imported(source, tmp_path / "out")
    assert actions(found) == [Action(ActionKind.FINISHED)]
    assert left_out.count("step") == 1


def test_osworlds_results_need_its_task_files_for_the_instructions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = osworld(tmp_path, {"action": "DONE"})
    assert main(["data", "import", str(source.path), str(tmp_path / "out")]) == 2
    assert "--tasks" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_episode_without_a_score_has_no_reward(tmp_path: Path) -> None:
    source, _ = osworld(tmp_path, {"action": "DONE"}, score="nan")
    (found,), _ = imported(source, tmp_path / "out")
    assert (found.reward, found.fault) == (None, "OSWorld has no reward")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_an_episode_whose_files_are_no_regular_ones_is_left_out_and_named(tmp_path: Path, kind: str) -> None:
    def replace(path: Path) -> None:
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero") if kind == "device" else path.mkdir()

    source, episode = osworld(tmp_path, {"action": "DONE"})
    copies = [shutil.copytree(episode, episode.with_name(f"task-{number}")) for number in (2, 3)]
    for copy in copies:
        shutil.copy(tmp_path / "examples/os/task-1.json", tmp_path / f"examples/os/{copy.name}.json")
    replace(copies[0] / "traj.jsonl")
    replace(copies[1] / "result.txt")
    (first, third), left_out = imported(source, tmp_path / "out")
    assert (first.reward, third.reward) == (1.0, None)
    assert left_out.reasons("episode") == {"its traj.jsonl cannot be read": 1}


def test_demonstrations_are_checked_and_copied(tmp_path: Path) -> None:
    imported(agentnet(tmp_path / "in", "pyautogui.press('a')", task_id="one"), tmp_path / "first")
    imported(agentnet(tmp_path / "in-2", "pyautogui.press('b')", task_id="two"), tmp_path / "first" / "more")
    (broken,) = find_demonstrations(tmp_path / "first" / "more")
    (broken / "screenshots" / "0000.png").write_bytes(picture(size=(10, 10)))
    found, left_out = imported(Source(tmp_path / "first"), tmp_path / "out")
    (original,) = find_demonstrations(tmp_path / "first" / "000000-one")
    assert found == [read_demonstration(original)]
    assert left_out.reasons("episode") == {"it is not a valid demonstration": 1}


def test_the_format_is_recognised_by_the_files(tmp_path: Path) -> None:
    source = agentnet(tmp_path / "agentnet", "pyautogui.press('a')")
    assert recognise_format(source.path) is Format.AGENTNET
    assert recognise_format(osworld(tmp_path / "osworld", {"action": "DONE"})[0].path) is Format.OSWORLD
    imported(source, tmp_path / "out")
    assert recognise_format(tmp_path / "out") is Format.DESKRL
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no recorded episodes were found"):
        recognise_format(tmp_path / "empty")


def test_an_import_without_a_result_names_the_reasons_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = agentnet(tmp_path / "in", "pyautogui.mouseDown()")
    assert main(["data", "import", str(source.path), str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert NOT_AN_ACTION in captured.out
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_existing_folder_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = agentnet(tmp_path / "in", "pyautogui.press('a')")
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("out", "link"):
        assert main(["data", "import", str(source.path), str(tmp_path / name)]) == 2
        assert f"{name}: exists" in capsys.readouterr().err
    assert main(["data", "import", str(source.path), str(tmp_path / "new" / "..")]) == 2
    assert "not the name of a folder" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_import_leaves_nothing_and_can_be_repeated(tmp_path: Path, number: signal.Signals) -> None:
    class Interruption(LeftOut):
        def add(self, what: str, reason: str, name: str) -> None:
            os.kill(os.getpid(), number)

    source = agentnet(tmp_path / "in", "pyautogui.press('a')")
    file = tmp_path / "in" / "agentnet.jsonl"
    file.write_text("damaged\n" + file.read_text())
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        import_episodes(source, tmp_path / "out", Interruption())
    assert [path.name for path in tmp_path.iterdir()] == ["in"] and signal.getsignal(number) == handler
    (tmp_path / ".out.partial" / "of-a-killed-one").mkdir(parents=True)
    imported(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["000000-2024_sort"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    source = agentnet(tmp_path / "in", "pyautogui.press('a')")
    command = [sys.executable, "-m", "deskrl.cli.main", "data", "import", str(source.path), str(tmp_path / "out")]
    done = subprocess.run(["bash", "-c", 'ulimit -f 0; "$@"', "-", *command], capture_output=True, text=True)
    assert done.returncode == 2
    assert "0000.png: cannot be written: File too large (hint: " in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [
        "traj",
        "value",
        "image",
        "code",
        "instruction",
        "action",
        "action_type",
        "parameters",
        "command",
        "x",
        "y",
        "text",
    ]
)
RECORDS = st.dictionaries(KEYS, JSON | st.dictionaries(KEYS, JSON) | st.lists(st.dictionaries(KEYS, JSON)))


@settings(max_examples=60, deadline=None)
@given(st.lists(RECORDS, max_size=4))
def test_any_json_is_imported_or_left_out_but_never_an_error(records: list[dict[str, Any]]) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        source = agentnet(folder / "agentnet", "pyautogui.press('a')")
        with open(source.path / "agentnet.jsonl", "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        found, left_out = imported(source, folder / "out")
        assert len(found) + left_out.count("episode") + left_out.count("line") == 1 + len(records)
        source, _ = osworld(folder / "osworld", {"action": "WAIT"}, *records)
        (one,), left_out = imported(source, folder / "out-2")
        assert len(one.steps) + left_out.count("step") + left_out.count("line") == 1 + len(records)
