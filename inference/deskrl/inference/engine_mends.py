"""What is mended in vLLM until a release does it. Each mend says what goes wrong without it, and which test shows it.

Imported into the engine's process by `transfer`; a release without the named function has nothing to be mended.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched import output


def _keep_all(mm_features: Any, *_: Any, **__: Any) -> Any:
    return mm_features


# vLLM 0.32 does not hand a worker the pixels of screenshots whose tokens are in the prefix cache. A weight update
# empties that cache and has the kept requests computed anew, for which the worker lacks the pixels: the engine dies.
# test_inference_replica: a later step of an episode goes on under new vision weights.
if hasattr(output, "strip_covered_mm_data"):
    output.strip_covered_mm_data = _keep_all
