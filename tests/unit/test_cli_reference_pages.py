"""The reference of configuration and commands: complete, equal to the help, and up to date in docs/reference."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deskrl.cli.configuration_keys import configuration_sections
from deskrl.cli.main import build_parser, main
from deskrl.cli.reference_pages import write_pages
from deskrl.core.config.config_errors import known_keys

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
COMMAND = "run python -m deskrl.cli.reference_pages docs/reference"


@pytest.mark.parametrize("page", ["configuration.md", "commands.md"])
def test_a_page_of_the_reference_is_that_of_the_code(tmp_path: Path, page: str) -> None:
    write_pages(tmp_path)
    generated, committed = ((folder / page).read_text(encoding="utf-8") for folder in (tmp_path, REFERENCE))
    assert committed == generated, COMMAND


def test_every_key_has_a_type_a_default_and_a_meaning() -> None:
    sections = configuration_sections()
    keys = [key for section in sections for key in section.keys]
    options = [section for section in sections if section.are_options]
    names = {key.name for section in options for key in section.keys} | {section.name for section in options}
    assert names == known_keys() | {""}
    assert [key.name for key in keys if not (key.kind and key.default and key.meaning)] == []
    assert [section.name for section in sections if not section.meaning] == []


@pytest.mark.parametrize("command", ["up", "explain", "eval", "learner"])
def test_the_help_of_a_command_lists_every_key_within_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    sections = configuration_sections()
    names = [f"--{key.name}" for section in sections if section.are_options for key in section.keys]
    assert [name for name in names if not re.search(rf"^  {re.escape(name)}  \S", text, re.MULTILINE)] == []
    assert re.search(r"^  reward.terms.NAME.weight  number", text, re.MULTILINE)
    assert [line for line in text.splitlines() if len(line) > 80] == []
    words = " ".join(text.split())
    assert "--learner.grpo.clip_low number >= 0, <= 1; default: 0.2 Lower clipping range:" in words
    assert "--model.path path; default: unset Directory of a model" in words
    assert "--desktop.memory_bytes integer >= 1; default: 2147483648 (2 GiB) Memory limit" in words


def test_the_help_of_a_command_that_accepts_no_keys_lists_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["view", "--help"])
    text = capsys.readouterr().out
    assert "--learner" not in text
    assert "a free port (default: 7441)" in " ".join(text.split())


def test_every_command_and_argument_has_a_help_text() -> None:
    _, commands = build_parser()
    assert "tasks check" in commands.parsers
    assert [name for name, parser in commands.parsers.items() if not parser.description] == []
    missing = [
        f"{name} {action.dest}"
        for name, parser in commands.parsers.items()
        for action in parser.arguments
        if not action.help
    ]
    assert missing == []
