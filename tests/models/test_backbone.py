from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import KINDS, build, candidate_of, logits_of, random_plan, save, state_of

from autopeft.errors import ModelError
from autopeft.models import checkpoint
from autopeft.models.attach import attach
from autopeft.models.backbone import (
    Backbone,
    build_from_config,
    build_meta,
    load_backbone,
    load_processor,
    load_tokenizer,
)
from autopeft.models.loading import prepare_config, restore_config
from autopeft.plan import AdapterPlan

_CLS, _LM = "AutoModelForSequenceClassification", "AutoModelForCausalLM"


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "distilbert", "albert", "deberta-v2", "llama-cls"]
)
def test_the_head_that_a_checkpoint_lacks_is_found_with_and_without_weights(
    name: str, tmp_path: Path
) -> None:
    folder = save(name, tmp_path)
    kwargs = {"num_labels": 4}
    loaded = load_backbone(folder, auto_class=_CLS, model_kwargs=kwargs)
    meta = build_meta(folder, auto_class=_CLS, model_kwargs=kwargs)
    assert loaded.head == meta.head
    assert set(loaded.head) >= set(KINDS[name].head) - {"pooler.dense"}
    assert loaded.topology == meta.topology
    assert loaded.topology.head_params > 0
    assert all(p.is_meta for p in meta.model.parameters())
    assert not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_a_language_model_has_no_new_head(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path, with_head=True)
    assert load_backbone(folder, auto_class=_LM).head == ()
    assert build_meta(folder, auto_class=_LM).head == ()


def test_a_head_of_the_right_size_is_kept_and_one_of_another_size_is_new(tmp_path: Path) -> None:
    folder = save("bert", tmp_path, with_head=True)
    assert load_backbone(folder, auto_class=_CLS).head == ()
    assert load_backbone(folder, auto_class=_CLS, model_kwargs={"num_labels": 7}).head == (
        "classifier",
    )


def test_loading_twice_gives_the_same_model_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    folder = save("bert", tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one, two = (load_backbone(folder, auto_class=_CLS) for _ in range(2))
    assert torch.equal(torch.rand(2), expected)
    for name, tensor in state_of(one)["tensors"].items():
        assert torch.equal(tensor, two.model.state_dict()[name])


def test_training_mode_repeats_itself(tmp_path: Path) -> None:
    backbone = load_backbone(save("bert", tmp_path), auto_class=_CLS)
    batch = {"input_ids": torch.arange(3, 13).reshape(2, 5)}
    with attach(backbone, candidate_of(AdapterPlan()), seed=0) as attached:
        attached.model.train()
        assert torch.equal(logits_of(attached.model, batch), logits_of(attached.model, batch))
    assert backbone.config_before["", "hidden_dropout_prob"] == 0.1


def test_a_prepared_configuration_is_restored() -> None:
    config = KINDS["t5"].config()
    before = config.to_dict()
    changed = prepare_config(config)
    assert config.dropout_rate == 0.0
    assert not config.use_cache
    restore_config(config, changed)
    assert config.to_dict() == before


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Addresses that this process tries to connect to."""
    tried: list[object] = []

    def connect(self: socket.socket, address: object) -> None:
        tried.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return tried


@pytest.mark.parametrize("model", ["./nowhere", "/no/such/folder", "~/nowhere", "a/b/c"])
def test_a_missing_folder_is_reported_without_asking_the_hub(
    model: str, connections: list[object]
) -> None:
    with pytest.raises(ModelError, match="no such folder") as caught:
        load_backbone(model, auto_class=_CLS)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer(model)
    assert connections == []


def test_a_hub_id_without_the_hub_is_one_line_and_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch, connections: list[object]
) -> None:
    monkeypatch.setattr(checkpoint, "is_hub_reachable", lambda: False)
    with pytest.raises(ModelError, match="the hub cannot be reached") as caught:
        load_backbone("nobody/no-such-model", auto_class=_CLS)
    assert "\n" not in str(caught.value)
    assert connections == []


def test_what_is_no_folder_is_said_to_be_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for name in ("pipe", "file"):
        with pytest.raises(ModelError, match="is no folder"):
            load_backbone(str(tmp_path / name), auto_class=_CLS)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_backbone(str(tmp_path), auto_class=_CLS)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(ModelError, match="AutoConfig cannot load it"):
        load_backbone(str(tmp_path), auto_class=_CLS)


def test_a_model_of_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        load_backbone(save("vit", tmp_path), auto_class=_LM)


def test_weights_that_do_not_fit_their_configuration_are_refused(tmp_path: Path) -> None:
    folder = save("bert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ModelError, match="its weights do not fit"):
        load_backbone(folder, auto_class=_CLS)


def test_a_resnet_is_no_transformer() -> None:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    with pytest.raises(ModelError, match="is not a transformer"):
        Backbone(hf.AutoModelForImageClassification.from_config(config))


def test_a_model_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(save("bert", tmp_path))


def test_an_unknown_class_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such class"):
        load_backbone(save("bert", tmp_path), auto_class="AutoModelForMiracles")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_trained_in_single_precision(dtype: str, tmp_path: Path) -> None:
    backbone = load_backbone(save("bert", tmp_path), auto_class=_CLS, dtype=dtype)
    with attach(backbone, candidate_of(random_plan(backbone.topology, 0, 0.5)), seed=0) as attached:
        kinds = {
            p.dtype
            for part in attached.parts
            if part.group.method.name != "ln_tuning"
            for p in part.parameters()
        }
    assert kinds == {torch.float32}
    assert build("bert").model.dtype == torch.float32


_OWN_CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: build_meta(folder, auto_class=_CLS),
        lambda folder: load_backbone(folder, auto_class=_CLS),
        lambda folder: build_from_config(folder),
        lambda folder: load_tokenizer(folder),
        lambda folder: load_processor(folder, "AutoImageProcessor"),
        lambda folder: load_processor(folder, "AutoFeatureExtractor"),
        lambda folder: load_processor(folder, "AutoProcessor"),
    ],
)
def test_code_that_comes_with_a_model_is_not_run_nor_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Any
) -> None:
    classes = ("Config", "ModelForSequenceClassification", "ImageProcessor", "FeatureExtractor")
    own: dict[str, Any] = {f"Auto{name}": "own.Part" for name in (*classes, "Processor")}
    own["AutoTokenizer"] = ["own.Part", None]
    config = {"model_type": "of its own", "auto_map": own}
    for name in ("config", "tokenizer_config", "preprocessor_config"):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(_OWN_CODE)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with pytest.raises(ModelError, match="code of its own, which autopeft does not run"):
        load(str(tmp_path))
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"model_type": "bert", "num_labels": 10**9}, "num_labels=1e\\+09"),
        ({"model_type": "bert", "num_hidden_layers": 10**9}, "num_hidden_layers=1e\\+09"),
        ({"model_type": "bert", "vocab_size": 10**12}, "vocab_size=1e\\+12"),
        ({"model_type": "bert", "hidden_size": "wide"}, "cannot load it"),
        ({"model_type": "bert", "num_attention_heads": 0}, "cannot load it"),
        ({"model_type": "bert", "id2label": 3}, "cannot load it"),
        ({"model_type": ["bert"]}, "cannot load it"),
        ([1], "cannot load it"),
    ],
)
def test_a_hostile_configuration_is_one_line(tmp_path: Path, row: Any, problem: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(row))
    with pytest.raises(ModelError, match=problem):
        build_meta(str(tmp_path), auto_class=_CLS)


def test_a_pickle_beside_a_configuration_is_not_unpickled(tmp_path: Path) -> None:
    folder = Path(save("bert", tmp_path))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    target = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> Any:
            return target.touch, ()

    torch.save({"weight": Hostile()}, folder / "pytorch_model.bin")
    for load in (build_meta, load_backbone):
        with pytest.raises(ModelError, match="cannot load it"):
            load(str(folder), auto_class=_CLS)
    assert not target.exists()
