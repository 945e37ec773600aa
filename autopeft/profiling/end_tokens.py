"""Find out whether a classifier can read texts by their end tokens.

T5, BART and their kin classify a text by the decoder's state at its last end token: a text without
one, or a batch of texts with unequal numbers of them, ends in an error.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from autopeft.profiling.causality import END, small_model
from autopeft.utils.quiet import quiet_transformers


def takes_end_tokens(config: Any, auto_class: str, counts: Collection[int]) -> bool | None:
    """Return whether a model takes a batch whose rows have these numbers of end tokens.

    A model with random weights, one block and a small vocabulary is tried; None if it has none.

    Args:
        config: The model's configuration, from transformers.
        auto_class: Name of the class of transformers that loads it.
        counts: The numbers of end tokens.

    Example:
        >>> from transformers import T5Config
        >>> from autopeft.profiling.end_tokens import takes_end_tokens
        >>> config = T5Config(d_model=16, d_kv=8, d_ff=16, num_heads=2)
        >>> classifier = "AutoModelForSequenceClassification"
        >>> [takes_end_tokens(config, classifier, counts) for counts in ([1], [0], [1, 2])]
        [True, False, False]
    """
    length = max(counts) + 2
    ids = torch.tensor([[2] * (length - count) + [END] * count for count in counts])
    with torch.no_grad(), quiet_transformers():
        try:
            model = small_model(config, auto_class)
        except Exception:  # A model that cannot be this small; nothing is known about it.
            return None
        # Encoder-decoders without a head of their own do not make their decoder's input themselves.
        decoded = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **decoded)
        except Exception:
            return False
    return True
