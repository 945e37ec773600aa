"""Tokenizes texts with the model's own tokenizer."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopeft.errors import DataError
from autopeft.tasks.data import EncodedSplit
from autopeft.tasks.examples import Examples
from autopeft.utils.formatting import human_bytes
from autopeft.utils.hardware import available_memory_bytes
from autopeft.utils.quiet import quiet_transformers

TOO_LONG = "longer than max_length"
UNLIMITED = 1 << 30
"""`max_length` where neither the settings nor the model limit it."""
COVERED_SHARE = 0.99
"""Share of the rows that the default `max_length` leaves whole."""

_NO_LIMIT = 1_000_000  # A tokenizer without a limit reports an absurdly large one.


def tokenizer_limit(tokenizer: Any) -> int | None:
    """Return the longest sequence that a tokenizer's model takes, in tokens, if it says so."""
    own = int(getattr(tokenizer, "model_max_length", None) or _NO_LIMIT)
    return own if own < _NO_LIMIT else None


def padding_id(tokenizer: Any) -> int:
    """Return the token that pads batches.

    Many decoders have no padding token. The attention mask hides padding, so the end-of-text token
    is used. A decoder that classifies must know which token it is, see
    `TextClassification.model_kwargs`.
    """
    for candidate in (
        getattr(tokenizer, "pad_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ):
        if candidate is not None:
            return int(candidate)
    return 0


def encode_texts(
    tokenizer: Any, rows: Examples, targets: NDArray[Any], max_length: int, *, on_long: str = "cut"
) -> EncodedSplit:
    """Tokenize the "text" of rows, or "text" and "text_pair". The longer one is cut first.

    Args:
        tokenizer: A tokenizer of transformers.
        rows: The texts.
        targets: What is to be learned of each row, shape (n_rows, ...).
        max_length: Longest row, in tokens, special ones included.
        on_long: What becomes of longer rows: "cut" or "drop".

    Example:
        >>> import os
        >>> from transformers import AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained(
        ...     os.path.expanduser("~/.cache/autopeft/all-MiniLM-L6-v2")
        ... )
        >>> texts = {"text": ["a good film", "bad"]}
        >>> rows = autopeft.Examples.kept(texts, [None, None], "reviews.csv")
        >>> split = autopeft.encode_texts(tokenizer, rows, np.array([4.5, 1.0]), max_length=16)
        >>> split.row_arrays["labels"].tolist(), len(split.lengths)
        ([4.5, 1.0], 2)
    """
    second = {"text_pair": list(rows["text_pair"])} if "text_pair" in rows.columns else {}
    columns = {"text": list(rows["text"]), **second}
    coded, long = tokenized(tokenizer, columns, max_length)
    dropped: dict[str, int] = {}
    if on_long == "drop" and long:
        dropped = {TOO_LONG: len(long)}
        kept = without(long, len(rows))
        coded = {name: [values[row] for row in kept] for name, values in coded.items()}
        rows, targets, long = rows.take(kept), targets[kept], []
    kinds: dict[str, NDArray[Any]] = {}
    if second and "token_type_ids" in coded:
        kinds["token_type_ids"] = flat(coded["token_type_ids"]).astype(np.int8)
    return split_of(
        rows,
        coded["input_ids"],
        token_arrays=kinds,
        row_arrays={"labels": targets},
        n_truncated=len(long),
        dropped=dropped,
    )


def tokenized(
    tokenizer: Any, columns: Mapping[str, list[str]], max_length: int
) -> tuple[dict[str, list[list[int]]], list[int]]:
    """Return what a tokenizer returns for texts, and the positions of the rows that it cut.

    Args:
        tokenizer: A tokenizer of transformers.
        columns: Its arguments: "text" and perhaps "text_pair", or "text_target".
        max_length: Longest row, in tokens, special ones included.
    """
    with quiet_transformers():
        found = dict(tokenizer(**columns, return_attention_mask=False))
        long = [row for row, ids in enumerate(found["input_ids"]) if len(ids) > max_length]
        if long:
            # Cutting all rows at once would not tell which were too long.
            part = {name: [texts[row] for row in long] for name, texts in columns.items()}
            cut = tokenizer(
                **part, truncation=True, max_length=max_length, return_attention_mask=False
            )
            for name, values in found.items():
                for place, row in enumerate(long):
                    values[row] = cut[name][place]
    return found, long


def covering_length(lengths: NDArray[np.int64]) -> int:
    """Return the default `max_length` for rows of these lengths, shape (n_rows,)."""
    covering = int(np.quantile(lengths, COVERED_SHARE, method="higher"))
    longest = int(lengths.max())
    # A few longer rows cost little; a few very long ones would set the price of every batch.
    return longest if longest <= 1.5 * covering else min(longest, 8 * math.ceil(covering / 8))


def check_memory(n_bytes: int, source: str, what: str) -> None:
    """Raise a DataError if the images or sounds of a source do not fit into the free memory."""
    free = available_memory_bytes()
    if free is not None and n_bytes > free:
        raise DataError(
            "data",
            source,
            f"its {what} need {human_bytes(n_bytes)} of memory, and {human_bytes(free)} are free",
            f"use fewer rows (max_train_rows), or a model with smaller {what}",
        )


def without(places: Collection[int], n_rows: int) -> NDArray[np.int64]:
    """Return the positions of `n_rows` rows but these."""
    return np.setdiff1d(np.arange(n_rows), list(places)).astype(np.int64)


def split_of(
    rows: Examples,
    ids: Sequence[Sequence[int]],
    *,
    token_arrays: Mapping[str, NDArray[Any]] | None = None,
    row_arrays: Mapping[str, NDArray[Any]] | None = None,
    n_truncated: int = 0,
    **rest: Any,
) -> EncodedSplit:
    """Return the encoded split of rows.

    Args:
        rows: The rows.
        ids: Token ids of each sequence.
        token_arrays: Name -> one value per token.
        row_arrays: Name -> one value per row.
        n_truncated: Number of rows that were cut.
        rest: Further fields of `EncodedSplit`.
    """
    return EncodedSplit(
        tokens=flat(ids).astype(np.int32),
        offsets=np.cumsum([0, *map(len, ids)], dtype=np.int64),
        source_rows=rows.source_rows,
        source=rows.source,
        token_arrays=token_arrays or {},
        row_arrays=row_arrays or {},
        n_truncated=n_truncated,
        **rest,
    )


def flat(rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Return rows of whole numbers one after another."""
    return np.fromiter(chain.from_iterable(rows), dtype=np.int64)
