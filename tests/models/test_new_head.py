"""Which modules are new: what transformers reports about loading, and what a task replaces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import KINDS, candidate_of, disturb, save

from autopeft.costs.plan_rules import count_trainable
from autopeft.errors import ModelError
from autopeft.models.attach import attach
from autopeft.models.backbone import build_meta, load_backbone
from autopeft.models.export import export_merged
from autopeft.models.saving import load_adapter, save_adapter
from autopeft.plan import AdapterPlan

_CLS = "AutoModelForSequenceClassification"
_CLASSES = (_CLS, "AutoModelForTokenClassification", "AutoModelForCausalLM")
_BATCH = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 4, 3, 2]])}


def _fits(name: str, auto_class: str) -> bool:
    return type(KINDS[name].config()) in getattr(hf, auto_class)._model_mapping


@pytest.mark.parametrize("name", sorted(KINDS))
def test_priced_parameters_are_those_that_are_trained(name: str, tmp_path: Path) -> None:
    for with_head in (False, True):
        folder = save(name, tmp_path / f"head-{with_head}", with_head=with_head)
        for auto_class in {*_CLASSES, KINDS[name].auto_class}:
            if not _fits(name, auto_class):
                continue
            meta = build_meta(folder, auto_class=auto_class)
            loaded = load_backbone(folder, auto_class=auto_class)
            assert meta.head == loaded.head, auto_class
            assert meta.topology == loaded.topology, auto_class
            with attach(loaded, candidate_of(AdapterPlan()), seed=0) as attached:
                live = sum(p.numel() for p in attached.model.parameters() if p.requires_grad)
            assert live == count_trainable(meta.topology, AdapterPlan()), auto_class


def test_a_classifier_of_gpt_neox_trains_its_output_layer_only(tmp_path: Path) -> None:
    # Its base model is "gpt_neox" and its layer "score"; the checkpoint of a language model calls
    # its own head "embed_out".
    folder = save("gpt_neox", tmp_path, with_head=True)
    meta = build_meta(folder, auto_class=_CLS, model_kwargs={"num_labels": 2})
    assert meta.head == ("score",)
    assert meta.topology.head_params == 2 * 32


def test_a_pickled_checkpoint_is_asked_too(tmp_path: Path) -> None:
    folder = save("bert", tmp_path)
    weights = hf.AutoModel.from_pretrained(folder).state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert build_meta(folder, auto_class=_CLS).head == load_backbone(folder, auto_class=_CLS).head


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(tmp_path: Path) -> None:
    folder = save("bert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ModelError, match="its weights do not fit"):
        build_meta(folder, auto_class=_CLS)


def test_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    folder = save("bert", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing of use")
    with pytest.raises(ModelError, match="is no safetensors file"):
        build_meta(folder, auto_class=_CLS)


@pytest.mark.parametrize(
    ("name", "head"),
    [("bert", "classifier"), ("roberta", "classifier.out_proj"), ("llama-cls", "score")],
)
def test_a_replaced_head_is_trained_saved_and_loaded(name: str, head: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / "base", with_head=True)
    n_labels = KINDS[name].config().num_labels
    kwargs: dict[str, Any] = {
        "num_labels": n_labels,
        "id2label": {i: f"new-{i}" for i in range(n_labels)},
        "pad_token_id": 2,
    }
    meta = build_meta(folder, auto_class=_CLS, model_kwargs=kwargs, replaces_head=True)
    loaded = load_backbone(folder, auto_class=_CLS, model_kwargs=kwargs, replaces_head=True)
    assert meta.head == loaded.head == (head,)
    assert meta.topology.head_params == loaded.topology.head_params > 0
    old = loaded.model.get_parameter(f"{head}.weight").clone()
    starts = []
    for _ in range(2):
        with attach(loaded, candidate_of(AdapterPlan()), seed=7) as attached:
            starts.append(attached.model.get_parameter(f"{head}.weight").detach().clone())
    assert torch.equal(*starts)
    assert not torch.equal(starts[0], old)
    assert torch.equal(loaded.model.get_parameter(f"{head}.weight"), old)
    with attach(loaded, candidate_of(AdapterPlan()), seed=7) as attached, torch.no_grad():
        disturb(attached)
        save_adapter(attached, tmp_path / "saved")
        own = attached.model(**_BATCH).logits
        export_merged(attached, tmp_path / "merged")
    again = load_adapter(folder, tmp_path / "saved")
    plain = hf.AutoModelForSequenceClassification.from_pretrained(folder)
    given = load_adapter(plain.eval(), tmp_path / "saved")
    merged = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label[0] == "new-0"
    with torch.no_grad():
        for model in (again, given, merged):
            torch.testing.assert_close(model(**_BATCH).logits, own, rtol=1e-5, atol=1e-6)
