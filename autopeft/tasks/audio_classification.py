"""Classification of recordings into one class each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from autopeft.tasks.batch import Batch, Window
from autopeft.tasks.columns import Column
from autopeft.tasks.data import EncodedSplit, SplitName
from autopeft.tasks.encoding import TOO_LONG, covering_length, split_of, without
from autopeft.tasks.examples import Examples
from autopeft.tasks.reading import Table
from autopeft.tasks.sounds import (
    AUDIO,
    INPUTS,
    READ_FILE,
    TOKENS_PER_SECOND,
    features,
    is_raw,
    load_extractor,
    longest_sound,
    tokens_of,
    with_sounds,
)
from autopeft.tasks.text_classification import LABEL_NAMES, TextClassification

_USUAL_LIMIT = 30 * TOKENS_PER_SECOND
"""Default limit of `max_length` for a model that takes recordings of any length."""
_FEWEST = 5
"""Shorter recordings are padded to this length, or convolutions would find nothing."""


class AudioClassification(TextClassification):
    """Predicts one label per recording, read by the model's own feature extractor.

    A token of sound is 20 ms long. All recordings are padded to one length, or cut to it: that of
    the model, else what covers the training rows. So a score does not depend on which recordings
    share a batch.

    Args:
        labels: Label names in the order of their index.
        pad_id: Not used.
        metric: Quality to optimize: accuracy (default), f1, matthews or loss.
    """

    name = "audio-classification"
    description = "one class for each recording"
    columns = (
        AUDIO,
        Column("label", "label", "the class", names=(*LABEL_NAMES, "intent_class", "emotion")),
    )
    identity = ("key",)
    auto_class = "AutoModelForAudioClassification"
    input_names = INPUTS
    task_of_lists = task_of_numbers = ""

    def load_processor(self, model: str, revision: str | None = None) -> Any:
        """Return the model's feature extractor.

        Raises:
            ModelError: if it has none.
        """
        return load_extractor(model, "AutoFeatureExtractor", revision)

    def usage(self, rows: Examples, max_length: int) -> str:
        """Return Python that classifies a recording, padded as in training."""
        padding = ""
        if is_raw(self.processor):
            n_samples = max_length * self.processor.sampling_rate // TOKENS_PER_SECOND
            padding = f'padding="max_length", max_length={n_samples}, truncation=True, '
        return (
            "import soundfile\n"
            "from transformers import AutoFeatureExtractor\n\n"
            "extractor = AutoFeatureExtractor.from_pretrained(checkpoint)\n"
            f"{READ_FILE}"
            "inputs = extractor(\n"
            f'    sound.mean(axis=1), sampling_rate=rate, {padding}return_tensors="pt"\n'
            ")\n"
            "print(model.config.id2label[int(model(**inputs).logits.argmax())])"
        )

    def length_limit(self) -> int | None:
        """Return the longest recording that the model takes, in tokens of 20 ms."""
        return longest_sound(self.processor)

    def usual_length(self, splits: Mapping[SplitName, Examples]) -> int:
        """Return a length that covers 99 % of all recordings, in tokens of 20 ms, at most 30 s."""
        lengths = tokens_of([seconds for rows in splits.values() for seconds in rows["seconds"]])
        return max(_FEWEST, min(covering_length(lengths), _USUAL_LIMIT))

    def clean(self, table: Table) -> Examples:
        """Return the complete rows of a source; the "key" of a row is what its samples are.

        Raises:
            DataError: if a recording cannot be decoded, or labels are no classes.
        """
        name = self.find_columns(self.settings.column_names(), table)["audio"]
        return with_sounds(super().clean(table), name, self.processor)

    def encode(
        self, processor: Any, rows: Examples, labels: tuple[str, ...], max_length: int
    ) -> EncodedSplit:
        """Return what the feature extractor makes of recordings, and the index of each label.

        Raises:
            ModelError: if it returns arrays of several shapes.
            DataError: if there is not enough memory for them.
        """
        long, dropped = np.flatnonzero(tokens_of(rows["seconds"]) > max_length).tolist(), {}
        if self.settings.on_long == "drop" and long:
            dropped, rows, long = {TOO_LONG: len(long)}, rows.take(without(long, len(rows))), []
        index = {label: i for i, label in enumerate(labels)}
        arrays = features(processor, rows, max_length, self.settings.model)
        seconds = max_length / TOKENS_PER_SECOND
        return split_of(
            rows,
            [],
            row_arrays={
                **arrays,
                "labels": np.asarray([index[label] for label in rows["label"]], dtype=np.int64),
            },
            texts={"audio": rows["about"]},
            tokens_per_row=longest_sound(processor) or max_length,
            n_truncated=len(long),
            dropped=dropped,
            notes=(f"sounds are padded or cut to {seconds:g} s ({max_length} tokens of 20 ms)",),
        )

    def model_kwargs(self) -> dict[str, Any]:
        """Return size of the head and label names."""
        given = super().model_kwargs()
        del given["pad_token_id"]
        return given

    def windows(self, batch: Batch) -> dict[str, Window]:
        """Return nothing: frames are no tokens of the batch."""
        return {}
