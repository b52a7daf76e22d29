"""Check of `inference.external_parameters`: no field that deskrl sets itself."""

from __future__ import annotations

from typing import Any

_SET_BY_DESKRL = {
    "model": "inference.external_model",
    "max_tokens": "inference.max_action_tokens",
    "max_output_tokens": "inference.max_action_tokens",
    **dict.fromkeys(["system", "instructions"], "agent.prompt_file"),
    **dict.fromkeys(["messages", "input", "tools", "stream", "previous_response_id", "seed", "n", "background"], ""),
}
"""Fields of requests that are not parameters, with the key that determines them if there is one."""


def check_external_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters; raises ValueError if one of them is a field that deskrl sets."""
    for name in parameters:
        if name in _SET_BY_DESKRL:
            key = _SET_BY_DESKRL[name]
            raise ValueError(f"{name} is set by deskrl" + (f": set {key} instead" if key else ""))
    return parameters
