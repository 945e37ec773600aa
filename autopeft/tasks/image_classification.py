"""Classification of images into one class each."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopeft.errors import DataError, ModelError
from autopeft.models.backbone import load_processor
from autopeft.models.loading import first_line
from autopeft.tasks.batch import Batch, Window
from autopeft.tasks.columns import FILE_NAMES, Column
from autopeft.tasks.data import EncodedSplit
from autopeft.tasks.encoding import check_memory, split_of
from autopeft.tasks.examples import Examples
from autopeft.tasks.files import FILE, unreadable_image
from autopeft.tasks.reading import Table
from autopeft.tasks.text_classification import LABEL_NAMES, TextClassification
from autopeft.utils.formatting import human_bytes
from autopeft.utils.quiet import quiet_transformers

IMAGE_NAMES = ("img", "picture", "photo", "pixel_values")
_IMAGES_AT_ONCE = 64
_PIXELS_PER_TOKEN = 256
"""Pixels of an image that count as one token when evaluation batches are filled."""
_DEEP_MODES = ("I", "F")
"""Kinds of pixels with more than 8 bits, of which PIL cuts off what an 8-bit image cannot hold."""
_MANY_BYTES = 1 << 30


class ImageClassification(TextClassification):
    """Predicts one label per image, read by the model's own image processor.

    Pixels are kept as bytes if the processor's numbers can be told from them exactly, which is so
    for processors that resize, rescale and normalize; else as float32.

    Args:
        labels: Label names in the order of their index.
        pad_id: Not used.
        metric: Quality to optimize: accuracy (default), f1, matthews or loss.
    """

    name = "image-classification"
    description = "one class for each image"
    columns = (
        Column("image", "image", "the image", names=(*IMAGE_NAMES, *FILE_NAMES)),
        Column("label", "label", "the class", names=(*LABEL_NAMES, "fine_label")),
    )
    identity = ("key",)
    auto_class = "AutoModelForImageClassification"
    input_names = ("pixel_values",)
    task_of_lists = task_of_numbers = ""

    def load_processor(self, model: str, revision: str | None = None) -> Any:
        """Return the model's image processor.

        Raises:
            ModelError: if it has none.
        """
        return load_processor(model, "AutoImageProcessor", revision=revision)

    def clean(self, table: Table) -> Examples:
        """Return the complete rows of a source; the "key" of a row is what its pixels are.

        Raises:
            DataError: if an image cannot be decoded, or labels are no classes.
        """
        rows = super().clean(table)
        name = self.find_columns(self.settings.column_names(), table)["image"]
        keys = []
        for image, number in zip(rows["image"], (rows.source_rows + 1).tolist(), strict=True):
            try:
                pixels = _decoded(image, self._mode())
            except (OSError, TypeError, ValueError, SyntaxError) as error:
                path = getattr(image, "info", {}).get(FILE)
                problem, remedy = unreadable_image(number, path, name, first_line(error))
                if isinstance(image, str):
                    remedy += (
                        "; file names are read if all those files are there, relative to the "
                        "table's folder"
                    )
                raise DataError("data", table.source, problem, remedy) from None
            keys.append(f"{pixels.size} {hashlib.sha256(pixels.tobytes()).hexdigest()}")
        return replace(rows, columns={**rows.columns, "key": tuple(keys)})

    def _mode(self) -> str:
        """Return the kind of pixels that the model takes, by its name in PIL."""
        return "L" if getattr(_vision(self.model_config), "num_channels", 3) == 1 else "RGB"

    def strata(self, rows: Examples) -> Sequence[Hashable]:
        """Return the labels."""
        return rows["label"]

    def encode(
        self, processor: Any, rows: Examples, labels: tuple[str, ...], max_length: int
    ) -> EncodedSplit:
        """Return pixels of shape (n_rows, channels, height, width), and the index of each label.

        Raises:
            ModelError: if the processor returns other things than pixels of one shape.
            DataError: if there is not enough memory for them.
        """
        index = {label: i for i, label in enumerate(labels)}
        images = rows["image"]
        packed = _Pixels(processor)
        for start in range(0, len(images), _IMAGES_AT_ONCE):
            some = images[start : start + _IMAGES_AT_ONCE]
            pixels = self._processed(processor, [_decoded(each, self._mode()) for each in some])
            if not start:
                # As bytes, at least.
                check_memory(len(images) * pixels[0].size, rows.source, "images")
            packed.add(pixels)
        values, palette = packed.joined()
        notes: tuple[str, ...] = ()
        if values.nbytes >= _MANY_BYTES:
            notes = (f"the pixels of {rows.source} take {human_bytes(values.nbytes)} of memory",)
        return split_of(
            rows,
            [],
            row_arrays={
                "pixel_values": values,
                "labels": np.asarray([index[label] for label in rows["label"]], dtype=np.int64),
            },
            palettes={} if palette is None else {"pixel_values": palette},
            tokens_per_row=max(1, values[0, 0].size // _PIXELS_PER_TOKEN),
            notes=notes,
        )

    def _processed(self, processor: Any, images: list[Any]) -> NDArray[np.float32]:
        """Return what the model's processor makes of images, shape (n, channels, h, w)."""
        problem = ""
        try:
            with quiet_transformers():
                found = processor(images=images, return_tensors="np")
            pixels = np.asarray(found["pixel_values"])
            others = [name for name in found if name not in ("pixel_values", "pixel_mask")]
            if others:
                problem = f"its image processor also returns {', '.join(map(str, others))}"
            elif pixels.ndim != 4:
                problem = f"its image processor returns arrays of {pixels.ndim - 1} dimensions"
        except ValueError as error:
            problem = f"its image processor fails ({first_line(error)})"
        if problem:
            raise ModelError(
                "model",
                self.settings.model,
                problem,
                "use a model whose processor makes images of one size, such as ViT or Swin",
            )
        return pixels.astype(np.float32, copy=False)

    def usage(self, rows: Examples, max_length: int) -> str:
        """Return Python that classifies an image, turned upright as in training."""
        return (
            "from PIL import Image, ImageOps\n"
            "from transformers import AutoImageProcessor\n\n"
            "processor = AutoImageProcessor.from_pretrained(checkpoint)\n"
            'image = ImageOps.exif_transpose(Image.open("path/to/image.png"))\n'
            f'inputs = processor(image.convert("{self._mode()}"), return_tensors="pt")\n'
            "print(model.config.id2label[int(model(**inputs).logits.argmax())])"
        )

    def model_kwargs(self) -> dict[str, Any]:
        """Return size of the head and label names."""
        given = super().model_kwargs()
        del given["pad_token_id"]
        return given

    def windows(self, batch: Batch) -> dict[str, Window]:
        """Return nothing: patches are no tokens of the batch."""
        return {}


class _Pixels:
    """Collects pixels: as bytes while each float32 can be told from its byte, else as they are.

    A processor computes (byte * rescale_factor - mean) / std for each channel. Which number a byte
    stands for is taken from its own output, and compared for each pixel.
    """

    def __init__(self, processor: Any) -> None:
        is_normalized = getattr(processor, "do_normalize", False)
        mean = getattr(processor, "image_mean", None) if is_normalized else None
        std = getattr(processor, "image_std", None) if is_normalized else None
        self._mean = np.atleast_1d(np.asarray(0.0 if mean is None else mean, np.float32))
        self._std = np.atleast_1d(np.asarray(1.0 if std is None else std, np.float32))
        is_rescaled = getattr(processor, "do_rescale", False)
        self._factor = float(getattr(processor, "rescale_factor", 1.0)) if is_rescaled else 1.0
        self._palette: NDArray[np.float32] | None = None
        self._parts: list[NDArray[Any]] = []
        self._is_exact = True

    def add(self, pixels: NDArray[np.float32]) -> None:
        """Append images, shape (n, channels, height, width)."""
        codes = self._codes(pixels) if self._is_exact else None
        if codes is None and self._is_exact:
            self._is_exact = False
            self._parts = [self._numbers(part) for part in self._parts]
        self._parts.append(pixels if codes is None else codes)

    def joined(self) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """Return all pixels, and what their bytes stand for; None: they are float32."""
        return np.concatenate(self._parts), self._palette if self._is_exact else None

    def _codes(self, pixels: NDArray[np.float32]) -> NDArray[np.uint8] | None:
        """Return the bytes of pixels; None if they do not tell the numbers."""
        n_channels = pixels.shape[1]
        if self._palette is None:
            self._palette = np.full((n_channels, 256), np.nan, dtype=np.float32)
        mean, std = (np.broadcast_to(a, (n_channels,)) for a in (self._mean, self._std))
        scale = (std / self._factor).astype(np.float32)[:, None, None]
        shift = (mean / self._factor).astype(np.float32)[:, None, None]
        numbers = np.rint(pixels * scale + shift)
        if not (numbers.min() >= 0 and numbers.max() <= 255):  # also for NaN
            return None
        codes: NDArray[np.uint8] = numbers.astype(np.uint8)
        for channel in range(n_channels):
            known, own = self._palette[channel], codes[:, channel]
            fresh = np.full(256, np.nan, dtype=np.float32)
            fresh[own] = pixels[:, channel]
            np.copyto(known, fresh, where=np.isnan(known))
            if not np.array_equal(known[own], pixels[:, channel]):
                return None
        return codes

    def _numbers(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        assert self._palette is not None, "bytes were made with one"
        channels = [numbers[codes[:, c]] for c, numbers in enumerate(self._palette)]
        return np.stack(channels, axis=1)


def _vision(config: Any) -> Any:
    """Return the part of a configuration that is about images."""
    return getattr(config, "vision_config", None) or config


def _decoded(image: Any, mode: str) -> Any:
    """Return an image upright with pixels of a mode, "RGB" or "L".

    A file in memory is decoded from a copy, so that it keeps its bytes alone.

    Raises:
        OSError, TypeError, ValueError or SyntaxError: if it is no readable image of 8 bits.
    """
    import PIL.Image
    import PIL.ImageOps

    if isinstance(image, np.ndarray):
        image = PIL.Image.fromarray(image)
    if not isinstance(image, PIL.Image.Image):
        raise TypeError(f"a {type(image).__name__}")
    file = getattr(image, "fp", None)
    if isinstance(file, BytesIO):
        image = PIL.Image.open(BytesIO(file.getvalue()))
    if image.mode.startswith(_DEEP_MODES):
        raise ValueError(f"its pixels have more than 8 bits, mode {image.mode}")
    return PIL.ImageOps.exif_transpose(image).convert(mode)
