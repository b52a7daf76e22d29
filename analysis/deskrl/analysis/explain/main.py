"""Entry point of `deskrl explain`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from deskrl.analysis.explain.explanation import build_explanation
from deskrl.analysis.explain.render_text import print_explanation
from deskrl.analysis.explain.update_time import Assumptions
from deskrl.core.config import RunConfig
from deskrl.launch.arpo.translate import Note


def explain(config: RunConfig, notes: Sequence[Note], assumed: Assumptions, *, as_document: bool) -> int:
    """Print the explanation of a run and return the exit status.

    Args:
        config: run configuration.
        notes: translation of each ARPO key, if the configuration is one of ARPO's.
        assumed: assumptions of the time and memory predictions.
        as_document: print one JSON document instead of text.

    Raises:
        UserError: the configuration contradicts itself.
    """
    explanation = build_explanation(config, notes, assumed)
    if as_document:
        print(json.dumps(asdict(explanation), indent=2, default=str))
    else:
        print_explanation(explanation, config)
    return 0
