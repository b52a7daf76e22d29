"""The action languages of deskrl keep the contract that the suite for languages of one's own checks."""

from __future__ import annotations

from deskrl.actor.actions import ActionKind
from deskrl.testing.action_languages import ActionLanguageSuite

_UI_TARS_LACKS = frozenset({ActionKind.TRIPLE_CLICK, ActionKind.MIDDLE_CLICK})


class TestUiTars10(ActionLanguageSuite):
    selection = "ui_tars_1_0"
    lacks = _UI_TARS_LACKS


class TestUiTars15(ActionLanguageSuite):
    selection = "ui_tars_1_5"
    lacks = _UI_TARS_LACKS


class TestUiTars2(ActionLanguageSuite):
    selection = "ui_tars_2"
    lacks = _UI_TARS_LACKS


class TestQwen3VL(ActionLanguageSuite):
    selection = "qwen3_vl"


class TestQwen25VL(ActionLanguageSuite):
    selection = "qwen2_5_vl"


class TestOpenCUA(ActionLanguageSuite):
    selection = "opencua"


class TestAnthropicComputerUse(ActionLanguageSuite):
    selection = "anthropic_computer_use"


class TestOpenAIComputerUse(ActionLanguageSuite):
    selection = "openai_computer_use"
    lacks = frozenset({ActionKind.TRIPLE_CLICK})
