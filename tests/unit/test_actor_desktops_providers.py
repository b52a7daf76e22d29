"""A desktop provider of the user's own needs one class; what is wrong with it is rejected before a run starts."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deskrl.actor import desktop_check, extensions
from deskrl.actor import main as actor
from deskrl.actor.desktops.provider_registry import PROVIDERS, make_desktop, reap_desktops, select_provider
from deskrl.actor.tasks.evaluators import EvaluatorError, evaluate_task
from deskrl.actor.tasks.task_filter import filter_tasks
from deskrl.actor.tasks.task_schema import load_tasks, parse_task
from deskrl.core.config import RunConfig, read_resolved
from deskrl.core.config.loading import dump_config
from deskrl.core.errors import UserError
from deskrl.launch import preflight

OWN = """
from PIL import Image
from deskrl.actor.desktops.base import Desktop, DesktopGone
from deskrl.actor.desktops.provider import DesktopProvider

class Blank(Desktop):
    is_open = False
    async def reset(self): self.is_open = True
    async def close(self): self.is_open = False
    async def is_alive(self): return self.is_open
    async def act(self, action): pass
    async def screenshot(self): return Image.new("RGB", (1280, 720))

class Own(DesktopProvider):
    def make(self, config, options, name, run_root): return Blank()
"""

WRONG = {
    "Blank": "not a class derived from deskrl.actor.desktops.provider.DesktopProvider",
    "Incomplete": "it does not define make",
    "Raises": "cannot be created: KeyError: 'HOME_OF_THE_FARM'",
    "Missing": "has no attribute 'Missing'",
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Importable file `own_desktops.py` with providers of the user's own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "own_desktops.py"
    path.write_text(OWN)
    yield path
    sys.modules.pop("own_desktops", None)


def config_of(tmp_path: Path, provider: str, **keys: Any) -> RunConfig:
    return RunConfig.model_validate({"runs": tmp_path, "desktop": {"provider": provider, **keys}})


def test_the_providers_of_deskrl_are_registered() -> None:
    own = ["desktop_env", "docker", "embedded", "gymnasium", "openenv", "osworld", "remote", "simulated", "vmware"]
    assert PROVIDERS.names() == own


def test_a_provider_needs_only_make(own: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, "own_desktops:Own")
    extensions.check_extensions(config)
    assert type(make_desktop(config.desktop, "d", tmp_path)).__name__ == "Blank"
    assert reap_desktops(config.desktop, tmp_path / "desktops") == 0
    assert actor.longest_socket_path(config, tmp_path) is None
    preflight.check_socket_paths(config)
    tasks = load_tasks()
    assert filter_tasks(tasks, config) == (tasks, {}), "the desktops may have any program"
    assert desktop_check.try_desktop(config) == "requirements are met; no desktop was started"


def test_doctor_starts_a_desktop_that_starts_within_seconds(own: Path, tmp_path: Path) -> None:
    own.write_text(f"{OWN}    starts_within_seconds = True\n")
    assert "started in " in desktop_check.try_desktop(config_of(tmp_path, "own_desktops:Own"))


def test_doctor_says_why_a_desktop_does_not_start(own: Path, tmp_path: Path) -> None:
    text = OWN.replace("self.is_open = True", "raise KeyError('farm')")
    own.write_text(f"{text}    starts_within_seconds = True\n    start_hint = 'start the farm'\n")
    with pytest.raises(UserError, match=r"the desktop did not start: KeyError: 'farm' \(hint: start the farm\)"):
        desktop_check.try_desktop(config_of(tmp_path, "own_desktops:Own"))


def test_a_provider_rejects_tasks_that_its_desktops_cannot_run(own: Path, tmp_path: Path) -> None:
    own.write_text(f"{OWN}    def find_unmet(self, task): return 'it needs a keyboard'\n")
    with pytest.raises(UserError, match="it needs a keyboard"):
        filter_tasks(load_tasks(), config_of(tmp_path, "own_desktops:Own"))


def test_a_task_that_needs_what_a_desktop_does_not_have_gets_no_reward(own: Path, tmp_path: Path) -> None:
    evaluator = {"func": "compare_text_file", "result": {"type": "vm_file", "path": "~/a", "dest": "a"}}
    rule = {"expected": {"type": "rule", "rules": {"expected": "a"}}}
    record = {"id": "t", "instruction": "Write a.", "evaluator": evaluator | rule}
    desktop = make_desktop(config_of(tmp_path, "own_desktops:Own").desktop, "d", tmp_path)
    with pytest.raises(EvaluatorError, match="t: this desktop has no files"):
        asyncio.run(evaluate_task(desktop, parse_task(json.dumps(record).encode(), "t"), None))


def test_options_survive_the_resolved_configuration(own: Path, tmp_path: Path) -> None:
    own.write_text(
        f"from deskrl.core.config import Section\n{OWN}\n    class Options(Section):\n        farm: str = 'a'\n"
    )
    config = config_of(tmp_path, "own_desktops:Own", provider_options={"farm": "b"})
    dump_config(config, tmp_path / "config.json")
    assert select_provider(read_resolved(tmp_path / "config.json").desktop).options.farm == "b"


@pytest.mark.parametrize("name", WRONG)
def test_an_object_that_is_no_provider_is_rejected(own: Path, tmp_path: Path, name: str) -> None:
    own.write_text(
        f"{OWN}\nclass Incomplete(DesktopProvider): pass\n"
        "class Raises(Own):\n    def __init__(self): raise KeyError('HOME_OF_THE_FARM')\n"
    )
    with pytest.raises(UserError, match=WRONG[name]) as rejected:
        extensions.check_extensions(config_of(tmp_path, f"own_desktops:{name}"))
    assert rejected.value.message.startswith("desktop.provider: ")


def test_an_unknown_provider_is_rejected_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown desktop provider 'vmwre' .*docker, embedded, .* or your own as"):
        extensions.check_extensions(config_of(tmp_path, "vmwre"))


@pytest.mark.parametrize("method", ["make", "check_usable"])
def test_an_exception_of_a_provider_names_it(own: Path, tmp_path: Path, method: str) -> None:
    own.write_text(f"{OWN}\n    def {method}(self, *arguments): raise ConnectionError('the farm is closed')\n")
    with pytest.raises(UserError, match=f"own_desktops:Own: {method} failed: ConnectionError: the farm is closed"):
        make_desktop(config_of(tmp_path, "own_desktops:Own").desktop, "d", tmp_path)
