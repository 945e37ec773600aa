"""Greedy generation for a whole split: batched, padded on the left, with a cache of keys.

The cache and the padding are compared once, on the first batch, with a plain forward pass over the
generated rows. Where they differ (an adapter or a model that does not support them), rows are
generated one by one without a cache, and a warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from autopeft.utils.quiet import quiet_transformers

TOKENS_PER_BATCH = 4096
"""Padded tokens of a batch, generated ones included."""

SPARE_TOKENS = 8
"""A generation may be this much longer than the longest reference."""

TIE = 1e-2
"""Two tokens whose logits are closer than this share of the logits' range may swap places."""


GREEDY: Mapping[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}
"""Turns off what a checkpoint's generation settings ask for beside greedy search."""


@dataclass(frozen=True)
class Generator:
    """Generates a continuation of each prompt with a model and its adapters.

    Attributes:
        pad_id: Token that pads prompts; the attention mask hides it.
        end_ids: Tokens that end a generation.
        max_new_tokens: Longest generation, in tokens.
        is_encoder_decoder: Whether the prompt goes to an encoder.
        max_length: Longest row that the model takes, in tokens: prompt and generation, or of an
            encoder-decoder the generation alone; None: any.
    """

    pad_id: int
    end_ids: tuple[int, ...]
    max_new_tokens: int
    is_encoder_decoder: bool = False
    max_length: int | None = None

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
                        alone = (
                            self._generate(model, [p], device, use_cache=False) for p in prompts
                        )
                        return [self._until_end(tokens) for (tokens,) in alone]
                for row, tokens in zip(rows, found, strict=True):
                    generated[row] = self._until_end(tokens)
        return generated

    def _batches(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Yield positions of prompts of similar length, the longest first.

        A prompt that leaves less room than a whole generation is alone, so that it shortens no
        other's.
        """
        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        while order:
            first = prompts[order[0]]
            longest = len(first) + self.max_new_tokens
            is_short_of_room = self._n_new(len(first)) < self.max_new_tokens
            size = 1 if is_short_of_room else max(1, TOKENS_PER_BATCH // longest)
            yield order[:size]
            order = order[size:]

    def _n_new(self, n_prompt: int) -> int:
        """Return the longest generation after a prompt of `n_prompt` tokens, at least one."""
        if self.max_length is None:
            return self.max_new_tokens
        taken = 1 if self.is_encoder_decoder else n_prompt
        return max(1, min(self.max_new_tokens, self.max_length - taken))

    def _generate(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        device: str | torch.device,
        *,
        use_cache: bool = True,
    ) -> list[list[int]]:
        """Return the generated tokens of each prompt, with the one that ends them."""
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
            max_new_tokens=self._n_new(length),
            do_sample=False,
            num_beams=1,
            use_cache=use_cache,
            pad_token_id=self.pad_id,
            eos_token_id=list(self.end_ids) or None,
            **GREEDY,
        )
        start = 1 if self.is_encoder_decoder else length
        rows: list[list[int]] = output[:, start:].tolist()
        return [row[: len(self._until_end(row)) + 1] for row in rows]

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = (place for place, token in enumerate(tokens) if token in self.end_ids)
        return tokens[: next(ends, None)]

    def _agrees(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        generated: Sequence[Sequence[int]],
        device: str | torch.device,
    ) -> bool:
        """Return whether a plain forward pass over each row predicts the same tokens."""
        pairs = list(zip(prompts, generated, strict=True))
        # The longest prompts, and the shortest, which have the most padding.
        for prompt, tokens in (*pairs[:2], *pairs[2:][-2:]):
            if self.is_encoder_decoder:
                logits, tokens = self._decoded(model, prompt, tokens, device)
            else:
                ids = torch.tensor([[*prompt, *tokens]], device=device)
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
                # (n tokens, vocabulary), from the end: virtual tokens may stand before the prompt.
                logits = logits[-len(tokens) - 1 : -1]
            if not tokens:
                continue
            logits = logits.float()
            chosen = logits.gather(1, torch.tensor(tokens, device=device)[:, None])[:, 0]
            best = logits.max(dim=1).values
            spread = best - logits.min(dim=1).values
            if bool((best - chosen > TIE * spread).any()):
                return False
        return True

    def _decoded(
        self, model: Any, prompt: Sequence[int], tokens: Sequence[int], device: str | torch.device
    ) -> tuple[torch.Tensor, Sequence[int]]:
        """Return a decoder's logits for tokens, (n, vocabulary), and the tokens it could choose.

        Some models must begin or end with a certain token, whatever their logits say.
        """
        settings = model.generation_config
        start = settings.decoder_start_token_id
        start = model.config.decoder_start_token_id if start is None else start
        ids = torch.tensor([[start, *tokens[:-1]]], device=device)
        given = torch.tensor([prompt], device=device)
        logits: torch.Tensor = model(
            input_ids=given, attention_mask=torch.ones_like(given), decoder_input_ids=ids
        ).logits[0]
        first = int(list(tokens[:1]) == [settings.forced_bos_token_id])
        is_cut_off = len(tokens) == self._n_new(len(prompt))
        last = len(tokens) - int(is_cut_off and tokens[-1] == settings.forced_eos_token_id)
        return logits[first:last], tokens[first:last]
