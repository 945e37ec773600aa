"""Fine-tuning of an encoder-decoder, such as T5 or BART: learns a text from a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from autopeft.errors import ModelError
from autopeft.tasks.batch import Batch
from autopeft.tasks.columns import Column
from autopeft.tasks.conversations import SEPARATOR
from autopeft.tasks.data import IGNORED, EncodedSplit, Ragged
from autopeft.tasks.encoding import TOO_LONG, flat, split_of, tokenized, without
from autopeft.tasks.examples import Examples, is_missing
from autopeft.tasks.language import LanguageTask
from autopeft.tasks.reading import Table, languages

NO_TARGET = "the target has no token"


class Seq2Seq(LanguageTask):
    """Learns the target text of each source text.

    What an instruction or question is about stands behind it.

    Args:
        labels: Not used.
        pad_id: Id of the padding token.
        metric: Quality to optimize: loss (default), perplexity or token_accuracy.
    """

    name = "seq2seq"
    description = "a text for each text by an encoder-decoder: translation, summaries"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "source",
            "text",
            "the text to read",
            names=(
                *("instruction", "question", "input", "prompt"),
                *("article", "document", "dialogue", "text"),
            ),
        ),
        Column(
            "target",
            "text",
            "the text to write",
            names=("output", "completion", "highlights", "summary", "answer", "response"),
        ),
        Column("input", "text", "what an instruction or question is about", False, ("context",)),
    )
    target = "target"
    auto_class = "AutoModelForSeq2SeqLM"
    input_names: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "decoder_input_ids")
    sequence_names: tuple[str, ...] = ("source", "target")

    @classmethod
    def find_columns(cls, named: Mapping[str, str], table: Table) -> dict[str, str]:
        """Return the source's columns; of a column of translations, the first two languages."""
        usual = dict(zip(("source", "target"), languages(table.columns), strict=False))
        free = [name for name in usual.values() if name not in named.values()]
        roles = [role for role in usual if role not in named]
        return super().find_columns({**dict(zip(roles, free, strict=False)), **named}, table)

    def clean(self, table: Table) -> Examples:
        """Return the complete rows of a source, and say which languages were taken."""
        rows = super().clean(table)
        found = languages(table.columns)
        if not found or {"source", "target"} <= self.settings.column_names().keys():
            return rows
        names = self.find_columns(self.settings.column_names(), table)
        note = (
            f"of the languages {', '.join(found)} of {table.source}, {names['source']} is read and "
            f"{names['target']} is written; --columns source=NAME,target=NAME takes others"
        )
        return replace(rows, notes=(*rows.notes, note))

    def usage(self, rows: Examples, max_length: int) -> str:
        """Return Python that writes a text for a text."""
        return (
            "from transformers import AutoTokenizer\n\n"
            "tokenizer = AutoTokenizer.from_pretrained(checkpoint)\n"
            f'inputs = tokenizer("a text", truncation=True, max_length={max_length}, '
            'return_tensors="pt")\n'
            f"output = model.generate(**inputs, max_new_tokens={max_length}, do_sample=False, "
            "num_beams=1)\n"
            "print(tokenizer.decode(output[0], skip_special_tokens=True))"
        )

    def encode(
        self, processor: Any, rows: Examples, labels: tuple[str, ...], max_length: int
    ) -> EncodedSplit:
        """Tokenize sources and targets; the decoder reads the targets shifted by one.

        Both are cut at their ends, or the row is dropped. Equal to `DataCollatorForSeq2Seq` with
        the model's own `prepare_decoder_input_ids_from_labels`.
        """
        abouts = rows.columns.get("input", ("",) * len(rows))
        texts = [
            source if is_missing(about) else f"{source}{SEPARATOR}{about}"
            for source, about in zip(rows["source"], abouts, strict=True)
        ]
        found, long = tokenized(processor, {"text": texts}, max_length)
        written, more = tokenized(processor, {"text_target": list(rows["target"])}, max_length)
        sources, targets = found["input_ids"], written["input_ids"]
        cut, dropped = {*long, *more}, {}
        if self.settings.on_long == "drop" and cut:
            dropped = {TOO_LONG: len(cut)}
            kept = without(cut, len(rows))
            sources, targets = [sources[row] for row in kept], [targets[row] for row in kept]
            rows, cut = rows.take(kept), set()
        if empty := {row for row, target in enumerate(targets) if not target}:
            dropped[NO_TARGET] = len(empty)
            kept = without(empty, len(rows))
            sources, targets = [sources[row] for row in kept], [targets[row] for row in kept]
            rows, cut = rows.take(kept), cut - empty
        end = getattr(processor, "eos_token_id", None)
        notes: tuple[str, ...] = ()
        if endless := sum(end not in target for target in targets):
            notes = (
                f"{endless} of {len(targets)} targets have no end token, so a model does not learn "
                "to stop there",
            )
        start = self._start_id()
        shifted = [[start, *target[:-1]] for target in targets]
        offsets = np.cumsum([0, *map(len, targets)], dtype=np.int64)
        return split_of(
            rows,
            sources,
            ragged={
                "labels": Ragged(flat(targets).astype(np.int32), offsets),
                "decoder_input_ids": Ragged(flat(shifted).astype(np.int32), offsets),
            },
            n_truncated=len(cut),
            dropped=dropped,
            notes=notes,
        )

    def _start_id(self) -> int:
        """Return the token that a decoder starts from."""
        start = getattr(self.model_config, "decoder_start_token_id", None)
        if start is None:
            raise ModelError(
                "model",
                self.settings.model,
                "its configuration names no decoder_start_token_id",
                "use an encoder-decoder such as T5 or BART, or another --task",
            )
        return int(start)

    def row_losses(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed cross-entropy and the number of target tokens of each row."""
        losses, _ = self._token_losses(model, batch)
        return losses.sum(dim=1), (batch.labels != IGNORED).sum(dim=1).float()

    def score(self, model: torch.nn.Module, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Return the summed loss, the number of target tokens and of correct ones of each row."""
        losses, logits = self._token_losses(model, batch)
        is_learned = batch.labels != IGNORED
        is_right = (logits.argmax(dim=-1) == batch.labels) & is_learned
        return {
            "loss": losses.sum(dim=1),
            "weight": is_learned.sum(dim=1).float(),
            "correct": is_right.sum(dim=1).float(),
        }

    def prompt_and_reference(self, split: EncodedSplit, row: int) -> tuple[list[int], list[int]]:
        """Return the tokens of the source and of the target."""
        target = split.ragged["labels"]
        return (
            split.tokens[split.offsets[row] : split.offsets[row + 1]].tolist(),
            target.values[target.offsets[row] : target.offsets[row + 1]].tolist(),
        )

    @staticmethod
    def _token_losses(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each target token, (b, t), 0 for padding; and logits (b, t, v)."""
        logits: torch.Tensor = model(**batch.model_inputs(), use_cache=False).logits.float()
        losses = functional.cross_entropy(
            logits.transpose(1, 2), batch.labels, reduction="none", ignore_index=IGNORED
        )
        return losses, logits
