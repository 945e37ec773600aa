"""Supervised fine-tuning of a decoder: chats, prompts with completions, instructions, text."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from autopeft.errors import DataError
from autopeft.tasks.chat_encoding import encode_rows
from autopeft.tasks.columns import Column
from autopeft.tasks.conversations import LAYOUTS, PlainText, PromptCompletion, read_rows, row_key
from autopeft.tasks.data import EncodedSplit
from autopeft.tasks.decoder import DecoderTask
from autopeft.tasks.encoding import flat, split_of
from autopeft.tasks.examples import Examples
from autopeft.tasks.reading import Table

MAX_STRATA = 20
"""Splits balance the completions if there are at most this many different ones."""


class SupervisedFineTuning(DecoderTask):
    """Learns the assistant's turns of chats, or completions of prompts; prompts add no loss.

    Args:
        labels: Not used.
        pad_id: Id of the padding token.
        metric: Quality to optimize: loss (default), perplexity or token_accuracy.
    """

    name = "sft"
    description = "the assistant's turns of chats, completions of prompts, or text"
    columns = (
        Column("messages", "messages", "chats: lists of role and content", False),
        Column("prompt", "any", "the prompt, text or messages", False),
        Column("completion", "any", "the completion, text or messages", False),
        Column("instruction", "text", "the instruction or question", False),
        Column("input", "text", "what an instruction is about", False),
        Column("output", "text", "the answer to an instruction", False),
        Column("system", "text", "the system prompt", False),
        Column("tools", "any", "JSON schemas of tools", False),
        Column("template_options", "any", "arguments for the chat template", False),
        Column("text", "text", "text to learn as a whole", False),
    )
    target = "completion"
    can_pack = True

    @classmethod
    def find_columns(cls, named: Mapping[str, str], table: Table) -> dict[str, str]:
        """Return the column of each role of the first layout that fits.

        Raises:
            DataError: if a named column is missing, or no layout of chats, completions,
                instructions or text fits.
        """
        for role, name in named.items():
            if name not in table.column_names:
                columns = ", ".join(map(repr, table.column_names))
                raise DataError(
                    role, name, f"no such column in {table.source}", f"its columns are {columns}"
                )
        present = {name.casefold(): name for name in reversed(table.column_names)}
        for layout in LAYOUTS:
            wanted = {**layout.columns, **layout.optional}
            if layout.name == "preference" or not set(wanted).issuperset(named):
                continue
            found = {role: named.get(role) or present.get(name) for role, name in wanted.items()}
            if all(found[role] for role in layout.columns):
                return {role: name for role, name in found.items() if name is not None}
        raise DataError(
            "columns",
            dict(named),
            f"no layout of chats, completions, instructions or text fits {table.source} with the "
            f"columns {', '.join(map(repr, table.column_names))}",
            "name them, e.g. --columns messages=NAME or --prompt NAME --completion NAME",
        )

    @classmethod
    def check_fit(cls, table: Table, names: Mapping[str, str]) -> None:
        """Check the first rows; text beside other columns is not taken for text to learn.

        Raises:
            DataError: if they are not what this task learns from.
        """
        if set(names) == {"text"} and len(table.column_names) > 1:
            raise DataError(
                "task",
                None,
                f"{table.source} has more columns than {names['text']!r}, so it is not plain text",
                f"name the --task ({cls.name} learns the text as a whole)",
            )
        super().check_fit(table, names)

    def clean(self, table: Table) -> Examples:
        """Return the rows that can be learned from, each as what it means."""
        names = self.find_columns(self.settings.column_names(), table)
        has_template = bool(getattr(self.processor, "chat_template", None))
        values = {role: table.column(role, name) for role, name in names.items()}
        found = read_rows(values, names, has_template=has_template, source=table.source)
        return Examples(
            {"row": found.rows, "key": tuple(map(row_key, found.rows))},
            found.source_rows,
            table.source,
            found.dropped,
            table.notes,
        )

    identity = ("key",)

    def check_rows(self, rows: Examples) -> None:
        """Raise a DataError if text is to be generated, but rows have nothing to start from."""
        if self.needs_text() and any(isinstance(row, PlainText) for row in rows["row"]):
            raise DataError(
                "metric",
                self.quality.name,
                f"is of generated text, but the texts of {rows.source} have no prompt",
                f"use one of {', '.join(self.metrics)}, or give prompts with completions",
            )

    def strata(self, rows: Examples) -> Sequence[Hashable]:
        """Return the completions if they are few, else one stratum."""
        texts = [
            row.completion if isinstance(row, PromptCompletion) else None for row in rows["row"]
        ]
        return texts if len(set(texts)) <= MAX_STRATA else [0] * len(rows)

    def encode(
        self, processor: Any, rows: Examples, labels: tuple[str, ...], max_length: int
    ) -> EncodedSplit:
        """Tokenize rows with the tokenizer's chat template; "labels" are -100 but where learned."""
        found = encode_rows(
            processor,
            rows["row"],
            max_length,
            on_long="drop" if self.settings.on_long == "drop" else "cut",
            numbers=(rows.source_rows + 1).tolist(),
            column=rows.source,
            role="data",
        )
        learned = [row.labels.tolist() for row in found.rows]
        return split_of(
            rows.take(found.kept),
            [row.ids.tolist() for row in found.rows],
            token_arrays={"labels": flat(learned).astype(np.int32)},
            n_truncated=found.n_cut,
            dropped=found.dropped,
            notes=found.notes,
        )
