"""Pages of MiniWoB++ of which no tasks are made, with the reasons."""

from __future__ import annotations

UNPLAYABLE_PAGES = {
    "button-delay": "the reward depends on the seconds between two clicks, and so on the latency of the policy",
    "chase-circle": "the pointer must follow a moving circle continuously",
    "hover-shape": "the page never ends, and its highlighted shape changes every 2 s",
    "moving-items": "the shapes move, and the page ends by itself after 10 s",
    "simon-says": "the sequence is shown only for a few seconds, before the first screenshot or while none is taken",
    "stock-market": "the price changes every 0.1 s, and so the reward depends on the latency of the policy",
}
"""Reasons by page."""
