"""What tasks share that learn text: losses of tokens, and generated text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from autopeft.models.tuners.prompt import n_virtual_tokens
from autopeft.tasks.base import FloatArray, Generated, IntArray, Scores, Task
from autopeft.tasks.chat_turns import closing_token, end_of_turn
from autopeft.tasks.data import IGNORED, EncodedSplit, SplitName, TaskData
from autopeft.tasks.generation import SPARE_TOKENS, Generator
from autopeft.tasks.metrics import Needs


class LanguageTask(Task):
    """Learns tokens: reports loss, perplexity and token accuracy over all learned tokens."""

    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy")
    predicts: ClassVar[tuple[Needs, ...]] = ("text",)

    def loss_metric(self, name: str, scores: Scores) -> tuple[float, FloatArray]:
        """Return loss, perplexity or accuracy over all learned tokens of the split.

        The quality of a row is its share of correct tokens, else minus its mean loss.
        """
        if name == "token_accuracy":
            correct, weight = scores["correct"], scores["weight"]
            return float(correct.sum()) / float(weight.sum()), correct / np.maximum(weight, 1.0)
        loss, rows = super().loss_metric("loss", scores)
        # A float overflows beyond e^700; such a model is useless in any case.
        return math.exp(min(loss, 700.0)) if name == "perplexity" else loss, rows

    def generate(
        self, model: Any, data: TaskData, split: SplitName, rows: IntArray, device: Any
    ) -> Generated:
        """Return prompts, references and the text that a model writes by greedy search."""
        source = data.splits[split]
        pairs = [self.prompt_and_reference(source, row) for row in rows.tolist()]
        prompts = [prompt for prompt, _ in pairs]
        references = [reference for _, reference in pairs]
        is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        # A prompt of virtual tokens takes room as well.
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        write = Generator(
            data.pad_id,
            self._end_ids(self.processor, references),
            max(map(len, references)) + SPARE_TOKENS,
            is_encoder_decoder,
            None if room is None else int(room) - n_virtual_tokens(model),
        )
        written = write(model, prompts, device)
        return self._texts(prompts), self._texts(references), self._texts(written)

    def prompts_and_references(
        self, split: EncodedSplit, rows: IntArray
    ) -> tuple[list[str], list[str]]:
        """Return prompts and references as text."""
        pairs = [self.prompt_and_reference(split, row) for row in rows.tolist()]
        return self._texts([a for a, _ in pairs]), self._texts([b for _, b in pairs])

    def _texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return [str(self.processor.decode(row, skip_special_tokens=True)).strip() for row in rows]

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
    def _end_ids(tokenizer: Any, references: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """Return the tokens that end a text: the tokenizer's, and what ends the references.

        A chat template may end a turn with a token of its own, and spaces after it. A reference
        that was cut ends with any token, so at least half of them must end alike.
        """
        closing = Counter(closing_token(tokenizer, each) for each in references)
        usual = {token for token, n in closing.items() if 2 * n >= len(references)}
        return tuple(sorted({tokenizer.eos_token_id, end_of_turn(tokenizer), *usual} - {None}))
