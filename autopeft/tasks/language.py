"""What tasks share that learn text: losses of tokens, and generated text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autopeft.costs.objectives import objective
from autopeft.tasks.base import Evaluation, Scores, Task
from autopeft.tasks.data import IGNORED, EncodedSplit, SplitName, TaskData
from autopeft.tasks.generation import Generator

LANGUAGE_METRICS = tuple(objective(name) for name in ("loss", "perplexity", "token_accuracy"))

_SPARE_TOKENS = 8
"""A generation may be this much longer than the longest reference."""


class LanguageTask(Task):
    """Learns tokens: reports loss, perplexity and token accuracy over all learned tokens."""

    metrics = LANGUAGE_METRICS

    def summarize(self, scores: Scores, split: EncodedSplit, rows: NDArray[np.int64]) -> Evaluation:
        """Return loss, perplexity and accuracy over all learned tokens of the split.

        The quality of a row is its share of correct tokens if the metric is token_accuracy, else
        minus its mean loss.
        """
        n_tokens = float(scores["weight"].sum())
        loss = float(scores["loss"].sum()) / n_tokens
        metrics = {
            "loss": loss,
            # A float overflows beyond e^700; such a model is useless in any case.
            "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": float(scores["correct"].sum()) / n_tokens,
        }
        is_accuracy = self.quality.name == "token_accuracy"
        per_row = scores["correct"] if is_accuracy else -scores["loss"]
        return Evaluation(loss, metrics, per_row / np.maximum(scores["weight"], 1.0))

    def generated(
        self,
        model: Any,
        tokenizer: Any,
        data: TaskData,
        split: SplitName,
        rows: Sequence[int],
        device: str | torch.device,
    ) -> list[str]:
        """Return the text that a model generates for each prompt, by greedy search.

        Args:
            model: The model with its adapters, in evaluation mode.
            tokenizer: The model's tokenizer.
            data: The encoded data.
            split: Name of the split.
            rows: Positions in the split.
            device: Device of the model.
        """
        source = data.splits[split]
        prompts, ends, longest = [], set[int](), 1
        for row in rows:
            prompt, reference = self.prompt_and_reference(source, row)
            prompts.append(prompt)
            longest = max(longest, len(reference))
            ends.update(reference[-1:])
        is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        n_new = longest + _SPARE_TOKENS
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None:
            taken = 1 if is_encoder_decoder else max(map(len, prompts))
            n_new = max(1, min(n_new, int(room) - taken))
        generate = Generator(data.pad_id, self._end_ids(tokenizer, ends), n_new, is_encoder_decoder)
        tokens = generate(model, prompts, device)
        return [str(tokenizer.decode(each, skip_special_tokens=True)).strip() for each in tokens]

    def prompt_and_reference(self, split: EncodedSplit, row: int) -> tuple[list[int], list[int]]:
        """Return the tokens that a generation starts from, and those that it should give.

        Of several learned spans, as of a conversation, the last one is generated.
        """
        tokens = split.tokens[split.offsets[row] : split.offsets[row + 1]]
        labels = split.token_arrays["labels"][split.offsets[row] : split.offsets[row + 1]]
        is_learned = labels != IGNORED
        last = int(np.flatnonzero(is_learned)[-1])
        given = np.flatnonzero(~is_learned[: last + 1])
        start = int(given[-1]) + 1 if len(given) else 1
        return tokens[:start].tolist(), tokens[start : last + 1].tolist()

    @staticmethod
    def _end_ids(tokenizer: Any, ends: set[int]) -> tuple[int, ...]:
        """Return the tokens that end a text, as far as they are special ones.

        A chat template may end a turn with a token of its own, which then ends the references.
        """
        special = set(getattr(tokenizer, "all_special_ids", ()))
        own = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
        return tuple(sorted(own | (ends & special)))
