"""UI-TARS 2's action language for models of any architecture, for runs with tiny models.

Select it with `agent.action_language = "any_model_language:AnyModelLanguage"`. The tokenizers of tiny models have
tokens for its calls, so that an action takes few decisions.
"""

from __future__ import annotations

from deskrl.actor.agent.ui_tars import UiTars2


class AnyModelLanguage(UiTars2):
    """Coordinates in thousandths of the screenshot."""

    title = "UI-TARS 2 for any model"
    architectures = ()
