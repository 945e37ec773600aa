"""Forty rows for each task that reads texts."""

from __future__ import annotations

from typing import Any

WORDS = ["good", "bad"] * 20
REVIEWS = [{"text": f"a {w} film {n}", "label": w} for n, w in enumerate(WORDS)]
TAGGED = [
    {"tokens": ["Anna", "saw", w, str(n)], "ner_tags": ["B-PER", "O", "O", "O"]}
    for n, w in enumerate(WORDS)
]
DATA: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "text-classification": (REVIEWS, {}),
    "multi-label-classification": (
        [
            {"text": f"a {w} film {n}", "labels": [w, "film"][: 1 + n % 3 // 2]}
            for n, w in enumerate(WORDS)
        ],
        {},
    ),
    "regression": (
        [{"text": f"a {w} film {n}", "score": n % 5 + 0.5} for n, w in enumerate(WORDS)],
        {},
    ),
    "token-classification": (TAGGED, {}),
    "sft": ([{"prompt": f"film {n} was", "completion": f" {w}"} for n, w in enumerate(WORDS)], {}),
    "seq2seq": (
        [{"source": f"film {n} {w}", "target": f"{w} {n}"} for n, w in enumerate(WORDS)],
        {},
    ),
    "preference": (
        [
            {"prompt": f"film {n}", "chosen": f" good {n}", "rejected": f" bad {w}"}
            for n, w in enumerate(WORDS)
        ],
        {},
    ),
    "embeddings": (
        [{"anchor": f"film {n} {w}", "positive": f"plot {n}"} for n, w in enumerate(WORDS)],
        {},
    ),
}
