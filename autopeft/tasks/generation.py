"""Greedy generation for a whole split: batched, padded on the left, with a cache of keys.

The cache and the padding are compared once, on the first batch, with a plain forward pass over the
generated rows. Where they differ (an adapter or a model that does not support them), rows are
generated one by one without a cache, and a warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from autopeft.utils.quiet import quiet_transformers

TOKENS_PER_BATCH = 4096
"""Padded tokens of a batch, generated ones included."""

_TIE = 1e-2
"""Two tokens whose logits are closer than this share of the logits' range may swap places."""


@dataclass(frozen=True)
class Generator:
    """Generates a continuation of each prompt with a model and its adapters.

    Attributes:
        pad_id: Token that pads prompts; the attention mask hides it.
        end_ids: Tokens that end a generation.
        max_new_tokens: Longest generation, in tokens.
        is_encoder_decoder: Whether the prompt goes to an encoder.
    """

    pad_id: int
    end_ids: tuple[int, ...]
    max_new_tokens: int
    is_encoder_decoder: bool = False

    def __call__(
        self, model: Any, prompts: Sequence[Sequence[int]], device: str | torch.device
    ) -> list[list[int]]:
        """Return the generated tokens of each prompt, without those that end it.

        Args:
            model: A model of transformers with its adapters, in evaluation mode.
            prompts: Token ids of each prompt, at least one each.
            device: Device of the model.
        """
        generated: list[list[int]] = [[] for _ in prompts]
        is_checked = False
        with torch.inference_mode(), quiet_transformers():
            for rows in self._batches(prompts):
                part = [prompts[row] for row in rows]
                found = self._generate(model, part, device)
                if not is_checked:
                    is_checked = True
                    if not self._agrees(model, part, found, device):
                        warnings.warn(
                            f"generation with a cache is off: {type(model).__name__} with these "
                            "adapters computes other tokens without it; rows are generated one by "
                            "one, which is slower but correct",
                            stacklevel=2,
                        )
                        return [
                            self._generate(model, [p], device, use_cache=False)[0] for p in prompts
                        ]
                for row, tokens in zip(rows, found, strict=True):
                    generated[row] = tokens
        return generated

    def _batches(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Yield positions of prompts of similar length, the longest first."""
        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        while order:
            longest = len(prompts[order[0]]) + self.max_new_tokens
            size = max(1, TOKENS_PER_BATCH // longest)
            yield order[:size]
            order = order[size:]

    def _generate(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        device: str | torch.device,
        *,
        use_cache: bool = True,
    ) -> list[list[int]]:
        length = max(map(len, prompts))
        ids = np.full((len(prompts), length), self.pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            # An encoder's rows are padded on the right, as in training.
            place = slice(0, len(prompt)) if self.is_encoder_decoder else slice(-len(prompt), None)
            ids[row, place], mask[row, place] = prompt, 1
        output = model.generate(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=use_cache,
            pad_token_id=self.pad_id,
            eos_token_id=list(self.end_ids) or None,
            # What a checkpoint's generation settings ask for beside greedy search.
            repetition_penalty=1.0,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        start = 1 if self.is_encoder_decoder else length
        return [self._until_end(row) for row in output[:, start:].tolist()]

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(tokens) if token in self.end_ids]
        return tokens[: ends[0]] if ends else tokens

    def _agrees(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        generated: Sequence[Sequence[int]],
        device: str | torch.device,
    ) -> bool:
        """Return whether a plain forward pass over each row predicts the same tokens."""
        if self.is_encoder_decoder:
            return True  # transformers' own generation; no adapter of ours changes its cache.
        for prompt, tokens in list(zip(prompts, generated, strict=True))[:4]:
            if not tokens:
                continue
            ids = torch.tensor([[*prompt, *tokens]], device=device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
            logits = logits[len(prompt) - 1 : -1]  # (n tokens, vocabulary)
            chosen = logits.gather(1, torch.tensor(tokens, device=device)[:, None])[:, 0]
            best = logits.max(dim=1).values
            spread = best - logits.min(dim=1).values
            if bool((best - chosen > _TIE * spread).any()):
                return False
        return True
