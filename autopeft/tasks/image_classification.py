"""Classification of images into one class each."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from autopeft.errors import DataError
from autopeft.models.loading import not_loadable
from autopeft.tasks.batch import Batch, Window
from autopeft.tasks.columns import Column
from autopeft.tasks.data import EncodedSplit
from autopeft.tasks.encoding import split_of
from autopeft.tasks.examples import Examples
from autopeft.tasks.text_classification import LABEL_NAMES, TextClassification
from autopeft.utils.quiet import quiet_transformers

_IMAGES_AT_ONCE = 64


class ImageClassification(TextClassification):
    """Predicts one label per image, read by the model's own image processor.

    Args:
        labels: Label names in the order of their index.
        pad_id: Not used.
        metric: Quality to optimize: accuracy (default), f1, matthews or loss.
    """

    name = "image-classification"
    description = "one class for each image"
    columns = (
        Column("image", "image", "the image", names=("img", "pixel_values", "picture")),
        Column("label", "label", "the class", names=(*LABEL_NAMES, "fine_label")),
    )
    identity = ("image",)
    auto_class = "AutoModelForImageClassification"
    input_names = ("pixel_values",)
    task_of_lists = task_of_numbers = ""

    def load_processor(self, model: str, revision: str | None = None) -> Any:
        """Return the model's image processor.

        Raises:
            ModelError: if it has none.
        """
        import transformers

        with quiet_transformers():
            try:
                return transformers.AutoImageProcessor.from_pretrained(
                    model, revision=revision or "main"
                )
            except (OSError, ValueError, KeyError, ImportError) as error:
                raise not_loadable(model, "AutoImageProcessor", error) from error

    def strata(self, rows: Examples) -> Sequence[Hashable]:
        """Return the labels."""
        return rows["label"]

    def encode(
        self, processor: Any, rows: Examples, labels: tuple[str, ...], max_length: int
    ) -> EncodedSplit:
        """Return pixels of shape (n_rows, channels, height, width), and the index of each label.

        Raises:
            DataError: if an image cannot be read.
        """
        index = {label: i for i, label in enumerate(labels)}
        images = rows["image"]
        pixels = []
        for start in range(0, len(images), _IMAGES_AT_ONCE):
            part = [
                _as_rgb(image, row, rows)
                for row, image in enumerate(images[start : start + _IMAGES_AT_ONCE], start)
            ]
            pixels.append(np.asarray(processor(images=part, return_tensors="np")["pixel_values"]))
        return split_of(
            rows,
            [],
            row_arrays={
                "pixel_values": np.concatenate(pixels).astype(np.float32),
                "labels": np.asarray([index[label] for label in rows["label"]], dtype=np.int64),
            },
        )

    def model_kwargs(self) -> dict[str, Any]:
        """Return size of the head and label names."""
        given = super().model_kwargs()
        del given["pad_token_id"]
        return given

    def windows(self, batch: Batch) -> dict[str, Window]:
        """Return nothing: patches are no tokens of the batch."""
        return {}


def _as_rgb(image: Any, row: int, rows: Examples) -> Any:
    """Return an image with three channels; grey ones are common and processors refuse them."""
    try:
        return image.convert("RGB")
    except (OSError, AttributeError, ValueError, SyntaxError) as error:
        raise DataError(
            "image",
            f"row {rows.source_rows[row] + 1} of {rows.source}",
            f"is not a readable image ({error})",
            "remove or replace it",
        ) from None
