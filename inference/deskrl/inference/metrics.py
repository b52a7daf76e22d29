"""Prometheus metrics of an inference replica; vLLM exports its own metrics (`vllm:*`) on the same port."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

ACTS = Counter("deskrl_inference_acts_total", "Number of Act calls, by outcome", ["outcome"])
ACT_SECONDS = Histogram(
    "deskrl_inference_act_seconds",
    "Latency of an Act call",
    buckets=(0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
PROMPT_TOKENS = Counter("deskrl_inference_prompt_tokens_total", "Number of prompt tokens, with expanded images")
ACTION_TOKENS = Counter("deskrl_inference_action_tokens_total", "Number of sampled tokens")
ACT_STAGE_SECONDS = Histogram(
    "deskrl_inference_act_stage_seconds",
    "Latency of each stage of an Act call: preparation of prompt and screenshots (`image`), the phases of the engine"
    " (`queue`, `prefill`, `decode`), and the remainder (`rest`)",
    ["stage"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
RUNNING_ACTS = Gauge("deskrl_inference_running_acts", "Number of actions in the engine, including its queue")
CACHED_PROMPT_TOKENS = Counter(
    "deskrl_inference_cached_prompt_tokens_total", "Number of prompt tokens that were found in the prefix cache"
)
IMAGE_SECONDS = Histogram(
    "deskrl_inference_image_seconds",
    "Time to decode and scale one screenshot, in a separate thread",
    buckets=(0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1),
)
IMAGE_BYTES = Gauge("deskrl_inference_image_cache_bytes", "Size of the cache of preprocessed screenshots in bytes")
UPDATES = Counter("deskrl_inference_weight_updates_total", "Number of weight updates, by outcome", ["outcome"])
UPDATE_SECONDS = Histogram(
    "deskrl_inference_weight_update_seconds",
    "Duration of each phase of a weight update",
    ["phase"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
POLICY_STEP = Gauge("deskrl_inference_policy_step", "Step of the served policy version")

# All series exist from the start, with the value zero: a rate then includes the first event, and a counter without
# events is distinguishable from one that is not scraped.
for _outcome in ("sampled", "missing_images", "refused", "engine_dead"):
    ACTS.labels(_outcome)
for _stage in ("image", "queue", "prefill", "decode", "rest"):
    ACT_STAGE_SECONDS.labels(_stage)
for _phase in ("pause", "load", "verify", "clear_caches", "resume", "canary"):
    UPDATE_SECONDS.labels(_phase)
for _outcome in ("committed", "refused", "failed"):
    UPDATES.labels(_outcome)
