"""Find out whether a model keeps rows apart that are packed into one sequence."""

from __future__ import annotations

from typing import Any

import torch

from autopeft.profiling.causality import small_model
from autopeft.utils.quiet import quiet_transformers


def keeps_rows_apart(config: Any, auto_class: str) -> bool:
    """Return whether two rows in one sequence have the logits that each has alone.

    One block with random weights and a small vocabulary is run. Models without position ids (Bloom,
    T5), and those that carry a state along a sequence (Mamba), do not.

    Args:
        config: A model's configuration, from transformers.
        auto_class: Name of the class of transformers that loads it.

    Example:
        >>> from transformers import BloomConfig
        >>> from autopeft.profiling.packing import keeps_rows_apart
        >>> keeps_rows_apart(BloomConfig(hidden_size=32, n_head=2), "AutoModelForCausalLM")
        False
    """
    rows = torch.arange(2, 9)[None], torch.arange(9, 14)[None]
    positions = [torch.arange(row.shape[1])[None] for row in rows]
    with torch.no_grad(), quiet_transformers():
        try:
            model = small_model(config, auto_class)
            alone = torch.cat([model(input_ids=row, use_cache=False).logits for row in rows], dim=1)
            together = model(
                input_ids=torch.cat(rows, dim=1),
                position_ids=torch.cat(positions, dim=1),
                use_cache=False,
            ).logits
        except Exception:  # A model that takes no positions, or cannot be this small.
            return False
    return bool((together - alone).abs().max() <= 1e-4 * alone.abs().max())
