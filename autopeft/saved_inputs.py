"""Data and models given as objects, saved once where workers, resume and report find them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from autopeft.errors import DataError, ModelError, SettingsError, StorageError
from autopeft.utils.formatting import one_line
from autopeft.utils.quiet import quiet_datasets, quiet_transformers
from autopeft.utils.scratch import scratch_folder
from autopeft.workspace import SETTINGS

_NAMES = {"data": "train", "validation": "validation", "test": "test"}
"""Setting -> name of its file or folder below `data/`."""


@contextmanager
def saved_inputs(given: Mapping[str, Any], folder: Path | None) -> Iterator[dict[str, Any]]:
    """Return settings whose objects are paths to what was saved.

    Nothing stays if the block fails before it has written the settings of a search.

    Args:
        given: Settings; data, validation and test may be a `datasets.Dataset`, a `DatasetDict`, a
            DataFrame or a list of dicts, and model a model of transformers with `tokenizer` beside.
        folder: Where `data/` and `model/` are written; None: a temporary folder.

    Raises:
        UserError: if an object cannot be saved.
    """
    plain: dict[str, Any] = dict(given)
    tokenizer = plain.pop("tokenizer", None)
    if tokenizer is not None and isinstance(plain.get("model"), str | os.PathLike | None):
        problem = "is only for a model that is given as an object"
        raise SettingsError("tokenizer", type(tokenizer).__name__, problem, "leave it out")
    objects = {}
    for name in ("model", *_NAMES):
        value: Any = plain.get(name)
        if isinstance(value, os.PathLike):
            plain[name] = os.fspath(value)
        elif name != "model" and _is_list_of_paths(value):
            plain[name] = list(map(os.fspath, value))
        elif not isinstance(value, str | None):
            objects[name] = plain.pop(name)
    if not objects:
        yield plain
        return
    with nullcontext(folder) if folder is not None else scratch_folder() as target:
        assert target is not None
        for taken in filter(Path.exists, (target / "data", target / "model")):
            raise StorageError("output", str(taken), "is taken", "name another file or folder")
        is_new = not target.exists()
        try:
            for name, value in objects.items():
                if name == "model":
                    plain[name] = _save_model(value, tokenizer, target / "model")
                else:
                    plain[name] = _save_data(name, value, target / "data")
            yield plain
        except BaseException:
            if not (target / SETTINGS).exists():
                for part in ("data", "model"):
                    shutil.rmtree(target / part, ignore_errors=True)
                if is_new and target.exists() and not any(target.iterdir()):
                    target.rmdir()
            raise


def _is_list_of_paths(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(each, str | os.PathLike) for each in value)
    )


def _save_data(field: str, value: Any, folder: Path) -> str:
    """Write data below a folder, and return its path."""
    # What has not been imported cannot be given.
    datasets: Any = sys.modules.get("datasets")
    if datasets is not None and isinstance(value, datasets.Dataset | datasets.DatasetDict):
        is_split = isinstance(value, datasets.DatasetDict)
        path = folder / ("splits" if is_split and field == "data" else _NAMES[field])
        _save_dataset(field, value, path)
        return str(path)
    from autopeft.tasks.reading import read

    table = read(field, value)["train"]
    path = folder / f"{_NAMES[field]}.jsonl"
    # JSON keeps each row's own keys; Arrow would give all messages the keys of any of them.
    rows = (
        dict(zip(table.columns, row, strict=True))
        for row in zip(*table.columns.values(), strict=True)
    )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, default=_plain) + "\n")
    except (TypeError, ValueError):
        path.unlink()
    else:
        return str(path)
    from datasets import Dataset

    path = folder / _NAMES[field]
    columns = {name: [_image(cell) for cell in cells] for name, cells in table.columns.items()}
    try:
        dataset = Dataset.from_dict(columns)
    except Exception as error:  # of pyarrow and datasets
        raise _unsaved(field, value, error) from error
    _save_dataset(field, dataset, path)
    return str(path)


def _save_dataset(field: str, dataset: Any, path: Path) -> None:
    try:
        with quiet_datasets():
            dataset.save_to_disk(str(path))
    except Exception as error:  # of pyarrow, datasets and the file system
        raise _unsaved(field, dataset, error) from error


def _unsaved(field: str, value: Any, error: Exception) -> DataError:
    return DataError(
        field,
        type(value).__name__,
        f"cannot be saved for the workers ({one_line(error)[:200]})",
        "give rows of texts, numbers, lists, dicts or images; apply transforms with map() before",
    )


def _plain(value: Any) -> Any:
    """Return a number or list of numpy as Python's own."""
    if getattr(value, "ndim", 0) in (0, 1) and hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(type(value).__name__)


def _image(value: Any) -> Any:
    """Return an array of pixels as an image."""
    if getattr(value, "ndim", 0) not in (2, 3):
        return value
    from PIL import Image

    return Image.fromarray(value)


def _save_model(model: Any, tokenizer: Any, folder: Path) -> str:
    """Write a model and its tokenizer or processor into a folder, and return its path."""
    name = type(model).__name__
    transformers: Any = sys.modules.get("transformers")
    problem: tuple[str, str] | None = None
    if hasattr(model, "peft_config"):
        problem = "has adapters already", "give the model without them, or after merge_and_unload()"
    elif transformers is None or not isinstance(model, transformers.PreTrainedModel):
        problem = (
            "is not a model of transformers",
            "give a PreTrainedModel with tokenizer=, a folder or a hub id",
        )
    elif getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None):
        problem = "is quantized", "load it without quantization, and set quantization=bnb-4bit"
    elif tokenizer is None:
        problem = (
            "is an object without its tokenizer",
            "give tokenizer=, its tokenizer or processor",
        )
    if problem is not None:
        raise ModelError("model", name, *problem)
    for part in (model, tokenizer):
        try:
            with quiet_transformers():
                part.save_pretrained(str(folder))
        except Exception as error:  # of transformers, safetensors and the file system
            reason = one_line(error)[:200]
            raise ModelError(
                "model",
                type(part).__name__,
                f"cannot be saved for the workers ({reason})",
                "save it with save_pretrained, and name the folder",
            ) from error
    return str(folder)
