"""What an inference replica tells Prometheus; vLLM adds its own `vllm:*` figures to the same port."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

ACTS = Counter("deskrl_inference_acts_total", "Act calls by outcome", ["outcome"])
ACT_SECONDS = Histogram(
    "deskrl_inference_act_seconds",
    "Time from an Act request to its action",
    buckets=(0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
PROMPT_TOKENS = Counter("deskrl_inference_prompt_tokens_total", "Tokens of prompts, images expanded")
ACTION_TOKENS = Counter("deskrl_inference_action_tokens_total", "Tokens sampled")
ACT_STAGE_SECONDS = Histogram(
    "deskrl_inference_act_stage_seconds",
    "Where the time of an Act goes: prompt and screenshots (`image`), the engine's phases, and what is left (`rest`)",
    ["stage"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
RUNNING_ACTS = Gauge("deskrl_inference_running_acts", "Actions that the engine is at, those in its queue too")
CACHED_PROMPT_TOKENS = Counter(
    "deskrl_inference_cached_prompt_tokens_total", "Tokens of prompts that the prefix cache held already"
)
IMAGE_SECONDS = Histogram(
    "deskrl_inference_image_seconds",
    "Time to decode and scale one screenshot, in a thread of its own",
    buckets=(0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1),
)
IMAGE_BYTES = Gauge("deskrl_inference_image_cache_bytes", "Screenshots held, ready for the engine")
UPDATES = Counter("deskrl_inference_weight_updates_total", "Weight updates by outcome", ["outcome"])
UPDATE_SECONDS = Histogram(
    "deskrl_inference_weight_update_seconds",
    "Phases of weight updates",
    ["phase"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
POLICY_STEP = Gauge("deskrl_inference_policy_step", "Step of the policy version served")

# From the start all series are there, at zero: a rate sees the first one, and "none" is told apart from "not scraped".
for _outcome in ("sampled", "missing_images", "refused", "engine_dead"):
    ACTS.labels(_outcome)
for _stage in ("image", "queue", "prefill", "decode", "rest"):
    ACT_STAGE_SECONDS.labels(_stage)
for _phase in ("pause", "load", "verify", "clear_caches", "resume", "canary"):
    UPDATE_SECONDS.labels(_phase)
for _outcome in ("committed", "refused", "failed"):
    UPDATES.labels(_outcome)
