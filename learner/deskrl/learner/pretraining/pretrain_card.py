"""Model card of the pretrained policy: how it was made, what it can do, and what it cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deskrl.learner.pretraining.policy_folder import SYSTEM_PROMPT
from deskrl.learner.pretraining.pretrain_config import PretrainConfig

_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [deskrl, gui-agent, computer-use]
---

# {name}

A Qwen2.5-VL of {parameters:.1f} million parameters that reads a screenshot of 504 x 280 pixels and clicks on the
element that the instruction names. It was trained by `deskrl pretrain` from random weights, on screens that are drawn
at random during the training; no other data was used.

## How it was made

{screens:,} screens in {steps:,} optimizer steps and {elapsed_s:.0f} s on device `{device}`, seed {seed}, fonts {fonts}.
Dense targets (the character under each part of each patch, the image tokens of the named element) teach reading and
finding; the policy does not keep their predictions. The weights are in bfloat16; `SHA256SUMS` has their checksums.

## Evaluation

Share of screens on which the greedy answer is a click on the named element. Held-out screens consist of names, grids
and fill colours that training never draws. Chance is a click on a random element.

| screens | training distribution | held out | chance (held out) |
| --- | --- | --- | --- |
{rows}

## Use

The system prompt is "{system}", the user's message is the instruction followed by one screenshot, and the answer is
UI-TARS 1.5's `click(start_box='(x,y)')` with pixels of the screenshot (`agent.prompt = "brief"`).

## What it cannot do

- Screens of other sizes than 504 x 280: see the row of small screens.
- Any action but a click, tasks of several steps, and instructions that do not quote the text of the element.
- Characters other than ASCII letters and digits, and text below 11 pixels.
- It has not been trained on screenshots of real applications.
"""


def pretrain_card(config: PretrainConfig, result: Mapping[str, Any]) -> str:
    """Return the text of the model card.

    Args:
        config: configuration of the training.
        result: content of the training's result.json.
    """
    rows = [
        f"| {name} | {trained['hit']:.3f} | {held_out['hit']:.3f} | {held_out['chance']:.3f} |"
        for name, (trained, held_out) in (
            (name, (parts["training"], parts["held_out"])) for name, parts in result["evaluation"].items()
        )
    ]
    return _CARD.format(
        name=config.name,
        parameters=result["num_parameters"] / 1e6,
        screens=result["screens"],
        steps=result["step"],
        elapsed_s=result["elapsed_s"],
        device=config.device,
        seed=config.seed,
        fonts=", ".join(config.fonts),
        rows="\n".join(rows),
        system=SYSTEM_PROMPT,
    )
