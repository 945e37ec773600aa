from __future__ import annotations

import json
import re
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
import transformers as hf
from covering import usual_first
from searches import loads, logits_of, searched

from autopeft.errors import DataError, ModelError
from autopeft.models.backbone import build_meta
from autopeft.profiling.fake_tensors import InputShape
from autopeft.profiling.measure import price_table
from autopeft.settings import SearchSettings
from autopeft.tasks import encoding, image_classification
from autopeft.tasks.batch import collate
from autopeft.tasks.data import TaskData
from autopeft.tasks.image_classification import ImageClassification
from autopeft.tasks.load_data import load_data, read_tables
from autopeft.tasks.preview import preview_of
from autopeft.tasks.reading import Table, read
from autopeft.tasks.registry import make_task
from autopeft.utils.quiet import quiet_transformers

CLASS = "AutoModelForImageClassification"
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
}


def to_16(**options: Any) -> Any:
    with quiet_transformers():
        return hf.ViTImageProcessor(size={"height": 16, "width": 16}, **options)


MODELS: dict[str, Any] = {
    "vit": (lambda: hf.ViTConfig(**VIT), to_16),
    "grey": (
        lambda: hf.ViTConfig(**VIT, num_channels=1),
        lambda: to_16(image_mean=[0.4], image_std=[0.3]),
    ),
    "swin": (
        lambda: hf.SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
        ),
        to_16,
    ),
    # The processor's size wins over the configuration's.
    "dinov2": (
        lambda: hf.Dinov2Config(**{**VIT, "image_size": 56}, mlp_ratio=2),
        lambda: hf.BitImageProcessor(
            size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}
        ),
    ),
    "siglip": (
        lambda: hf.SiglipConfig(vision_config=VIT, text_config={**VIT, "vocab_size": 50}),
        lambda: hf.SiglipImageProcessor(size={"height": 16, "width": 16}),
    ),
}


def save(name: str, folder: Path) -> Path:
    config, processor = MODELS[name]
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf.AutoModel.from_config(config()).save_pretrained(folder)
        processor().save_pretrained(folder)
    return folder


def picture(i: int) -> PIL.Image.Image:
    """Red if i is odd, blue if even; each of other pixels and another shape."""
    pixels = np.random.default_rng(i).integers(0, 120, (20 + i % 5, 24, 3)).astype(np.uint8)
    pixels[..., 0 if i % 2 else 2] += 100
    return PIL.Image.fromarray(pixels)


def name_of(i: int) -> str:
    return "red" if i % 2 else "blue"


def table_of(n: int = 40, **changed: Any) -> Table:
    rows = [{"image": changed.get(f"at{i}", picture(i)), "label": name_of(i)} for i in range(n)]
    return read("data", rows)["train"]


def loaded(table: Table, processor: Any, config: Any = None) -> tuple[Any, TaskData]:
    task = make_task(SearchSettings(model="tiny"), table, config)
    data = load_data(task.settings, task, processor, {"train": table})
    return task.bound(data), data


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "colors"
    for i in range(60):
        (folder / name_of(i)).mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / name_of(i) / f"{i:02}.png")
    return folder


@pytest.mark.parametrize("name", sorted(MODELS))
def test_pixels_are_those_of_the_models_own_processor(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / "model")
    processor = ImageClassification().load_processor(str(folder))
    task, data = loaded(table_of(), processor, hf.AutoConfig.from_pretrained(folder))
    assert data.train.row_arrays["pixel_values"].dtype == np.uint8
    for split in ("train", "validation", "test"):
        batch = collate(data, split, np.arange(4))
        for at, row in enumerate(data.splits[split].source_rows[:4].tolist()):
            image = picture(row).convert("L") if name == "grey" else picture(row)
            with quiet_transformers():
                alone = processor(images=image, return_tensors="pt")["pixel_values"]
            assert torch.equal(batch["pixel_values"][at], alone[0])
    model = getattr(hf, CLASS).from_pretrained(folder, **task.model_kwargs()).eval()
    batch = collate(data, "train", np.arange(6))
    with torch.no_grad():
        whole = model(pixel_values=batch["pixel_values"], labels=batch.labels).loss
        assert float(task.loss(model, batch)) == pytest.approx(float(whole), rel=1e-6)


def test_pixels_that_bytes_cannot_tell_stay_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_classification, "_IMAGES_AT_ONCE", 8)
    plain = to_16()

    def odd(images: Any, return_tensors: str) -> Any:
        found = plain(images=images, return_tensors=return_tensors)
        calls.append(len(images))
        # Only later images are of other numbers than the first ones' bytes stand for.
        return {"pixel_values": found["pixel_values"] * (1.0 if len(calls) < 3 else 1.003)}

    calls: list[int] = []
    odd.__dict__.update(vars(plain))
    table = table_of()
    task = make_task(SearchSettings(), table)
    split = task.encode(odd, task.clean(table), ("blue", "red"), 0)
    assert split.row_arrays["pixel_values"].dtype == np.float32
    assert not split.palettes
    first, later = split.row_arrays["pixel_values"][[0, 39]]
    with quiet_transformers():
        assert np.array_equal(first, plain(picture(0), return_tensors="np")["pixel_values"][0])
        whole = plain(picture(39), return_tensors="np")["pixel_values"][0]
    assert np.array_equal(later, (whole * 1.003).astype(np.float32))


def test_equal_pixels_are_one_image_whatever_their_file() -> None:
    rows: list[dict[str, Any]] = []
    for i in range(30):
        for kind in ("PNG", "BMP"):
            buffer = BytesIO()
            picture(i).save(buffer, kind)
            rows.append({"image": PIL.Image.open(buffer), "label": name_of(i)})
    _, data = loaded(read("data", rows)["train"], to_16())
    seen = {
        name: {row // 2 for row in split.source_rows.tolist()}
        for name, split in data.splits.items()
    }
    assert sum(map(len, seen.values())) == 30


def test_images_are_turned_upright() -> None:
    buffer = BytesIO()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture(3).save(buffer, "PNG", exif=exif)
    task = make_task(SearchSettings(), table_of())
    rows = task.clean(table_of(at3=PIL.Image.open(buffer), at4=picture(3).rotate(-90, expand=True)))
    assert rows["key"][3] == rows["key"][4] != rows["key"][5]


def cut_off() -> PIL.Image.Image:
    buffer = BytesIO()
    picture(0).save(buffer, "PNG")
    return PIL.Image.open(BytesIO(buffer.getvalue()[:-400]))


def test_a_damaged_file_is_named_alike_wherever_the_damage_is(
    image_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(image_folder, tmp_path / "colors")
    path = next((tmp_path / "colors").rglob("07.png"))
    whole, told = path.read_bytes(), []
    settings = SearchSettings(data=str(tmp_path / "colors"))
    for damaged in (b"no image", whole[:-40]):
        path.write_bytes(damaged)
        with pytest.raises(DataError) as raised:
            make_task(settings, table := read_tables(settings)["train"]).clean(table)
        told.append(re.sub(r" \(image .*\)|, row.*\)", "", str(raised.value)))
    assert told[0] == told[1]
    assert re.match(r"data='colors:train': row \d+ \(07.png\) of the column 'image' is", told[0])


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (cut_off(), "truncated"),
        ("photos/3.png", "a str"),
        (PIL.Image.fromarray(np.full((8, 8), 40_000, np.uint16)), "more than 8 bits"),
    ],
)
def test_what_is_no_image_of_8_bits_names_its_row(cell: Any, words: str) -> None:
    with pytest.raises(DataError) as raised:
        make_task(SearchSettings(task="image-classification"), table_of()).clean(table_of(at6=cell))
    message = str(raised.value)
    assert message.startswith("data='list': row 7 of the column 'image' is not a readable image (")
    assert message.endswith("remove or replace it") != isinstance(cell, str)
    assert words in message
    assert "\n" not in message


def test_processors_that_return_more_than_pixels_are_refused() -> None:
    def naflex(images: Any, return_tensors: str) -> Any:
        return {"pixel_values": np.zeros((len(images), 4, 9)), "spatial_shapes": []}

    with pytest.raises(ModelError, match="also returns spatial_shapes"):
        loaded(table_of(), naflex)
    with pytest.raises(ModelError, match="its image processor fails"):
        loaded(table_of(), to_16(do_resize=False))


def test_images_that_do_not_fit_into_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "available_memory_bytes", lambda: 1000)
    with pytest.raises(DataError, match="its images need"):
        loaded(table_of(), to_16())


def test_the_checkpoints_order_of_labels_is_kept() -> None:
    named = {
        "id2label": {0: "Red", 1: "Green", 2: "Blue"},
        "architectures": ["ViTForImageClassification"],
    }
    assert loaded(table_of(), to_16(), hf.ViTConfig(**VIT, **named))[1].labels == (
        "red",
        "Green",
        "blue",
    )
    named["id2label"] = {0: "cat", 1: "dog"}
    _, data = loaded(table_of(), to_16(), hf.ViTConfig(**VIT, **named))
    assert data.labels == ("blue", "red")
    assert any("a new head is trained" in note for note in data.notes)


@pytest.mark.parametrize("container", ["csv", "jsonl"])
def test_files_that_a_table_names_are_read_relative_to_it(
    container: str, image_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(image_folder, tmp_path / "colors")
    names = [f"{name_of(i)}/{i:02}.png" for i in range(20)]
    frame = pd.DataFrame({"path": names, "label": [name_of(i) for i in range(20)]})
    path = tmp_path / "colors" / f"table.{container}"
    if container == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=True)
    table = read("data", str(path))["train"]
    task = make_task(SearchSettings(), table, hf.ViTConfig(**VIT))
    assert task.name == "image-classification"
    keys = task.clean(table)["key"]
    assert keys == task.clean(table_of(20))["key"]
    (tmp_path / "colors" / names[3]).rename(tmp_path / "colors" / "another.png")
    table = read("data", str(path))["train"]
    assert list(table.columns["path"]) == names
    with pytest.raises(DataError, match=r"row 1 of .* if all those files are there, relative to"):
        task.clean(table)


def test_previews_show_the_label_and_no_tokens() -> None:
    task, data = loaded(table_of(), to_16())
    row = preview_of(data, task).rows[0]
    assert row.sequences == ()
    assert row.target == name_of(row.source_row)


def test_prices_are_of_the_processors_images(tmp_path: Path) -> None:
    meta = build_meta(str(save("dinov2", tmp_path / "model")), auto_class=CLASS)
    small, as_configured = (
        price_table(meta, batch_size=2, mean_length=1, longest_length=1, inputs=InputShape(shape))
        for shape in ({"pixel_values": (3, 16, 16)}, {})
    )
    assert 5 < as_configured.forward_flops / small.forward_flops < 15  # 50 and 5 tokens
    vit = build_meta(str(save("vit", tmp_path / "vit")), auto_class=CLASS)
    with pytest.raises(ModelError, match="refuses inputs of the data's shape"):
        price_table(
            vit,
            batch_size=2,
            mean_length=1,
            longest_length=1,
            inputs=InputShape({"pixel_values": (3, 24, 24)}),
        )


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", usual_first(["vit", "dinov2", "siglip", "swin"], "vit", "swin"))
def test_a_saved_adapter_scores_alike_from_outside(
    name: str, image_folder: Path, tmp_path: Path
) -> None:
    model = save(name, tmp_path / "model")
    found = searched(model, image_folder, tmp_path / "run")
    files = read("data", str(image_folder))["train"]
    processor = hf.AutoImageProcessor.from_pretrained(model)
    labels = json.loads((found.adapter / "plan.json").read_text())["model_kwargs"]["label2id"]
    pixels = processor([files.columns["image"][r] for r in found.test_rows], return_tensors="pt")
    targets = torch.tensor([labels[files.columns["label"][r]] for r in found.test_rows])
    for how, loaded_model in loads(found, CLASS, tmp_path / "merged").items():
        logits = logits_of(loaded_model, pixel_values=pixels["pixel_values"])
        right = (logits.argmax(dim=1) == targets).double().mean()
        assert found.score["accuracy"] == pytest.approx(float(right)), how
        loss = torch.nn.functional.cross_entropy(logits.double(), targets)
        assert found.score["loss"] == pytest.approx(float(loss), rel=1e-5), how
