"""Find out whether a model sees later tokens, as an encoder does.

A loss over next tokens says nothing about such a model: it reads the answer from its input.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from autopeft.models.loading import auto_loader
from autopeft.utils.device import drawn_on_host
from autopeft.utils.quiet import quiet_transformers

_VOCABULARY = 64

END = 1
"""The end token of `small_model`."""


def sees_later_tokens(config: Any, auto_class: str) -> bool | None:
    """Return whether the logits of a token depend on tokens after it; None if unknown.

    One block with random weights and a small vocabulary is run twice, with another last token.

    Args:
        config: A model's configuration, from transformers.
        auto_class: Name of the class of transformers that loads it.

    Example:
        >>> from transformers import BertConfig
        >>> from autopeft.profiling.causality import sees_later_tokens
        >>> config = BertConfig(hidden_size=32, num_attention_heads=2, intermediate_size=32)
        >>> sees_later_tokens(config, "AutoModelForCausalLM")
        True
    """
    ids = torch.arange(2, 10)[None]
    changed = ids.clone()
    changed[0, -1] = 1
    with torch.no_grad(), quiet_transformers():
        try:
            model = small_model(config, auto_class)
            first, second = (model(input_ids=x, use_cache=False).logits for x in (ids, changed))
        except Exception:  # A model that cannot be this small; nothing is known about it.
            return None
    earlier = (first - second)[:, :-1].abs().max()
    return bool(earlier > 1e-6 * first.abs().max())


def small_model(config: Any, auto_class: str) -> Any:
    """Return a model of a configuration with random weights, one block and a small vocabulary.

    Its padding token is 0, its end token `END`. A model that cannot be this small may raise
    anything.
    """
    shallow = copy.deepcopy(config)
    for part in {id(c): c for c in (shallow, shallow.get_text_config())}.values():
        part.num_hidden_layers = 1
        part.vocab_size = _VOCABULARY
        part.pad_token_id, part.bos_token_id, part.eos_token_id = 0, None, END
        if getattr(part, "is_encoder_decoder", False):
            part.decoder_start_token_id = 0
    with drawn_on_host(0):
        return auto_loader(auto_class).from_config(shallow, trust_remote_code=False).eval()
