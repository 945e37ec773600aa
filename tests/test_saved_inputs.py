"""Data and models given as objects: saved once, read back as they were, removed after a mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import transformers
from documented import SMALL
from PIL import Image

import autopeft
from autopeft.errors import StorageError, UserError
from autopeft.saved_inputs import saved_inputs
from autopeft.tasks.reading import read

ROWS: list[dict[str, Any]] = [
    {"text": "good", "label": 1, "messages": [{"role": "user", "content": "hi"}]},
    {"text": None, "label": 0, "messages": [{"role": "tool", "content": "x", "name": "f"}]},
    {"text": "naïve 東京\n", "label": 1, "messages": []},
]


def saved(folder: Path, **given: Any) -> dict[str, Any]:
    with saved_inputs(given, folder) as plain:
        return plain


def sentences(tiny_data: Path) -> datasets.Dataset:
    return datasets.Dataset.from_dict(dict(read("data", str(tiny_data))["train"].columns))


@pytest.mark.parametrize(
    "given", [ROWS, datasets.Dataset.from_list(ROWS), pandas.DataFrame(ROWS)], ids=["l", "d", "p"]
)
def test_cells_are_read_back_as_they_were(given: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, data=given)["data"]
    assert Path(path).is_relative_to(tmp_path / "data")
    before, after = read("data", given)["train"], read("data", path)["train"]
    assert dict(after.columns) == dict(before.columns)


def test_splits_stay_splits(tmp_path: Path) -> None:
    part = datasets.Dataset.from_list(ROWS)
    given = datasets.DatasetDict(train=part, validation=part.select([0]))
    tables = read("data", saved(tmp_path, data=given)["data"])
    assert {name: table.n_rows for name, table in tables.items()} == {"train": 3, "validation": 1}


def test_images_and_arrays_of_pixels_are_saved_as_images(tmp_path: Path) -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    rows = [{"image": Image.fromarray(pixels), "label": 0}, {"image": pixels, "label": 1}]
    table = read("data", saved(tmp_path, data=rows)["data"])["train"]
    for image in table.columns["image"]:
        assert np.array_equal(np.asarray(image), pixels)


def test_paths_become_text_and_texts_stay(tmp_path: Path) -> None:
    plain = saved(tmp_path, data=[Path("a.csv"), "b.csv"], validation=Path("c.csv"), test="d.csv")
    assert plain == {"data": ["a.csv", "b.csv"], "validation": "c.csv", "test": "d.csv"}
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_nothing_stays() -> None:
    with saved_inputs({"data": ROWS}, None) as plain:
        path = Path(plain["data"])
        assert path.exists()
    assert not path.exists()


def test_after_a_mistake_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(KeyError), saved_inputs({"data": ROWS, "test": ROWS}, tmp_path / "new"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"data": {"text": ["a"]}}, "is not data that can be read"),
        ({"data": []}, "there are no rows"),
        ({"data": 7}, "is not data that can be read"),
        ({"data": [{"text": object()}]}, "cannot be saved"),
        ({"model": object(), "data": "a.csv"}, "is not a model of transformers"),
        ({"model": "m", "tokenizer": object()}, "is only for a model"),
    ],
)
def test_what_cannot_be_saved_is_refused_in_one_line(
    given: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=problem) as caught, saved_inputs(given, tmp_path):
        pass
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_needs_its_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    model = transformers.AutoModel.from_pretrained(tiny_model)
    with (
        pytest.raises(UserError, match="give tokenizer="),
        saved_inputs({"model": model}, tmp_path),
    ):
        pass


def test_a_search_of_objects_can_be_moved_resumed_and_exported(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModel.from_pretrained(tiny_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    rows = sentences(tiny_data)
    result = autopeft.search(
        SMALL, model=model, tokenizer=tokenizer, data=rows, output=tmp_path / "first"
    )
    assert result.view.data.rows["train"] > 0
    moved = tmp_path / "elsewhere" / "first"
    moved.parent.mkdir()
    (tmp_path / "first").rename(moved)
    autopeft.resume(moved, budget="7trials")
    exported = autopeft.export(moved, pick="baseline", format="merged", to=tmp_path / "exported")
    assert exported.largest_difference is not None
    settings = autopeft.SearchResult.read(moved)
    assert settings.base_model == str(moved / "model")


def test_looking_at_objects_leaves_nothing(tiny_model: Path, tiny_data: Path) -> None:
    rows = sentences(tiny_data)
    of_file = autopeft.preview(model=str(tiny_model), data=str(tiny_data))
    of_object = autopeft.preview(model=str(tiny_model), data=rows)
    assert of_object.data.fingerprint == of_file.data.fingerprint
    assert autopeft.price(model=str(tiny_model), data=rows).rows


def test_init_saves_objects_beside_the_file(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    target = tmp_path / "search.yaml"
    rows = sentences(tiny_data).to_pandas()
    autopeft.init(str(tiny_model), rows, to=target)
    seen = autopeft.preview(target)
    assert seen.data.rows["train"] > 0
    with pytest.raises(StorageError, match="is taken"):
        autopeft.init(str(tiny_model), rows, to=tmp_path / "search.yml")
