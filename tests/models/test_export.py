from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import (
    KINDS,
    all_specs,
    assert_same_state,
    batch_for,
    build,
    candidate_of,
    disturb,
    logits_of,
    random_plan,
    save,
    state_of,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from autopeft import methods
from autopeft.errors import AdapterError, SettingsError
from autopeft.methods.registry import METHODS
from autopeft.models.attach import attach
from autopeft.models.backbone import load_backbone
from autopeft.models.export import export_adapter, export_merged
from autopeft.models.saving import load_adapter, save_adapter
from autopeft.plan import AdapterPlan, LayerSpec
from autopeft.utils.quiet import quiet_transformers

_CLS = "AutoModelForSequenceClassification"


def _plain(name: str, folder: Path) -> Any:
    """What transformers alone makes of a folder."""
    with quiet_transformers():
        model, info = getattr(hf, KINDS[name].auto_class).from_pretrained(
            folder, output_loading_info=True
        )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "albert"])
@pytest.mark.parametrize("seed", range(3))
def test_merged_logits_are_the_adapted_ones(name: str, seed: int, tmp_path: Path) -> None:
    backbone = build(name)
    batch = batch_for(backbone)
    base = state_of(backbone)
    drawn = random_plan(backbone.topology, seed, 0.7)
    plan = AdapterPlan(spec for spec in drawn.specs if methods.get(spec.method).mergeable)
    attached = attach(backbone, candidate_of(plan), seed=0)
    disturb(attached)
    logits = logits_of(attached.model, batch)
    export_merged(attached, tmp_path)
    assert torch.equal(logits_of(attached.model, batch), logits)
    attached.detach()
    assert_same_state(base, state_of(backbone))
    torch.testing.assert_close(
        logits_of(_plain(name, tmp_path), batch), logits, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("method", [m.name for m in methods.all_methods() if m.mergeable])
def test_every_mergeable_method_merges(method: str, tmp_path: Path) -> None:
    backbone = build("bert")
    specs = {
        (spec.layer, spec.role): spec
        for spec in all_specs(backbone.topology, (2, 4, 6, 8, 16))
        if spec.method == method and spec.role in ("attn.q", "mlp.down", "norm", "block")
    }
    plan = AdapterPlan(specs.values())
    batch = batch_for(backbone)
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
        logits = logits_of(attached.model, batch)
        export_merged(attached, tmp_path)
    assert not torch.allclose(logits_of(backbone.model, batch), logits, atol=1e-3)
    torch.testing.assert_close(
        logits_of(_plain("bert", tmp_path), batch), logits, rtol=1e-4, atol=1e-5
    )


def test_the_merged_model_has_the_base_models_dropout(tmp_path: Path) -> None:
    folder = save("bert", tmp_path / "base")
    backbone = load_backbone(folder, auto_class=_CLS)
    assert backbone.model.config.hidden_dropout_prob == 0.0
    with attach(backbone, candidate_of(AdapterPlan()), seed=0) as attached:
        export_merged(attached, tmp_path / "merged")
    assert backbone.model.config.hidden_dropout_prob == 0.0
    assert _plain("bert", tmp_path / "merged").config.hidden_dropout_prob == 0.1


def test_what_cannot_be_merged_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build("llama")
    lora = methods.get("lora")
    stuck = dataclasses.replace(lora, mergeable=False)
    known = METHODS._items["lora"]
    monkeypatch.setitem(METHODS._items, "lora", dataclasses.replace(known, value=stuck))
    plan = AdapterPlan([LayerSpec(1, "attn.q", "lora", 2)])
    with (
        attach(backbone, candidate_of(plan), seed=0) as attached,
        pytest.raises(AdapterError, match=r"model\.layers\.1\.self_attn\.q_proj"),
    ):
        export_merged(attached, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def _search_result(tmp_path: Path) -> tuple[str, Path, torch.Tensor]:
    base = save("bert", tmp_path / "base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(55))]
    (tmp_path / "base" / "vocab.txt").write_text("\n".join(words))
    backbone = load_backbone(base, auto_class=_CLS, model_kwargs={"num_labels": 3})
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 2), LayerSpec(1, "mlp.down", "ia3")])
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
        logits = logits_of(attached.model, _text())
        save_adapter(attached, tmp_path / "adapter")
    return base, tmp_path / "adapter", logits


def _text() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(5, 15).reshape(2, 5)}


def test_a_saved_adapter_is_exported_merged_with_its_tokenizer(tmp_path: Path) -> None:
    base, adapter, logits = _search_result(tmp_path)
    target = export_adapter(base, adapter, tmp_path / "deep" / "merged", format="merged").folder
    torch.testing.assert_close(
        logits_of(_plain("bert", target), _text()), logits, rtol=1e-4, atol=1e-5
    )
    assert hf.AutoTokenizer.from_pretrained(target)("w1 w2")["input_ids"] == [2, 6, 7, 3]
    assert [p.name for p in target.parent.iterdir()] == ["merged"]


def test_a_saved_adapter_is_exported_as_peft(tmp_path: Path) -> None:
    base, adapter, logits = _search_result(tmp_path)
    target = export_adapter(base, adapter, tmp_path / "peft", format="peft").folder
    assert torch.equal(logits_of(load_adapter(base, target), _text()), logits)
    assert (target / "part-1-lora" / "adapter_config.json").is_file()


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    base, adapter, _ = _search_result(tmp_path)
    (adapter / "head.safetensors").unlink()
    with pytest.raises(AdapterError):
        export_adapter(base, adapter, tmp_path / "peft", format="peft")
    with pytest.raises(SettingsError, match="use one of peft, lora, merged, gguf"):
        export_adapter(base, adapter, tmp_path / "peft", format="onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter"}


def test_a_merged_model_has_the_type_of_weights_that_was_asked_for(tmp_path: Path) -> None:
    base, adapter, logits = _search_result(tmp_path)
    target = tmp_path / "half"
    options: dict[str, Any] = {"format": "merged", "rows": _text(), "dtype": "bfloat16"}
    exported = export_adapter(base, adapter, target, **options)
    assert exported.largest_difference == pytest.approx(0.0, abs=0.02)
    model = hf.AutoModelForSequenceClassification.from_pretrained(target, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits_of(model, _text()).float(), logits, rtol=0.05, atol=0.02)


def test_a_merged_model_has_the_base_models_own_type_in_small_files(tmp_path: Path) -> None:
    base, adapter, logits = _search_result(tmp_path)
    model = hf.AutoModel.from_pretrained(base).to(torch.bfloat16)
    model.save_pretrained(base)
    options: dict[str, Any] = {"format": "merged", "rows": _text(), "max_shard_size": "20KB"}
    exported = export_adapter(base, adapter, tmp_path / "merged", **options)
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    written = hf.AutoModelForSequenceClassification.from_pretrained(exported.folder)
    assert {p.dtype for p in written.parameters()} == {torch.bfloat16}
    # What is told is the difference of the written files, rounded once.
    assert exported.largest_difference is not None
    assert 0.0 < exported.largest_difference < 0.02
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(("size", "is_split"), [("5GiB", False), ("1", True), (20_000, True)])
def test_a_shard_has_any_size_that_can_be_read(
    size: str | int, is_split: bool, tmp_path: Path
) -> None:
    """Regression: transformers was given the text, and reads fewer units than the check does."""
    base, adapter, logits = _search_result(tmp_path)
    options: dict[str, Any] = {"format": "merged", "max_shard_size": size}
    target = export_adapter(base, adapter, tmp_path / "merged", **options).folder
    assert (len(list(target.glob("model*.safetensors"))) > 1) == is_split
    torch.testing.assert_close(
        logits_of(_plain("bert", target), _text()), logits, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("format", "options", "named"),
    [
        ("merged", {"max_rank": 8}, "^max_rank=8: has no effect on format=merged.*--format lora$"),
        ("peft", {"max_rank": 8}, "^max_rank=8: has no effect on format=peft"),
        ("merged", {"allow_lossy": True}, "^allow_lossy=True: has no effect on format=merged"),
        ("gguf", {"max_shard_size": "1GB"}, "^max_shard_size='1GB': has no effect on format=gguf"),
        ("merged", {"max_shard_size": ""}, "^max_shard_size='': is no size"),
        ("merged", {"dtype": ""}, "^dtype='': no such type"),
        ("merged", {"device": "gpu"}, "^device='gpu': torch knows no such device"),
        ("lora", {"max_rank": 0}, "^max_rank=0: must be a whole number"),
        ("lora", {"max_rank": 2.5}, "^max_rank=2.5: must be a whole number"),
        ("lora", {"requantize": True}, "^requantize=True: format=lora holds no weights"),
    ],
)
def test_an_option_that_is_wrong_or_has_no_effect_is_refused_first(
    format: str, options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=named) as caught:
        export_adapter("no/such", tmp_path / "none", tmp_path / "to", format=format, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "to").exists()


def test_a_type_that_a_merged_model_cannot_have_is_no_default(tmp_path: Path) -> None:
    base, adapter, _ = _search_result(tmp_path)
    config = json.loads((Path(base) / "config.json").read_text())
    (Path(base) / "config.json").write_text(json.dumps({**config, "dtype": "int8"}))
    with pytest.raises(SettingsError, match=r"^dtype='int8': is the type of the base model's"):
        export_adapter(base, adapter, tmp_path / "to", format="merged")
    export_adapter(base, adapter, tmp_path / "to", format="merged", dtype="bfloat16")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("format", ["peft", "lora", "merged", "gguf"])
def test_tokenizer_template_and_generation_config_lie_beside_every_export(
    format: str, tmp_path: Path
) -> None:
    base = save("llama", tmp_path / "base", with_head=True)
    vocabulary = {"<unk>": 0, "hello": 1, "world": 2}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(base)
    backbone = load_backbone(base, auto_class="AutoModelForCausalLM")
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 2)])
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        save_adapter(attached, tmp_path / "adapter")
    exported = export_adapter(base, tmp_path / "adapter", tmp_path / "to", format=format)
    assert exported.missing == ()
    assert (exported.folder / "generation_config.json").is_file()
    again = hf.AutoTokenizer.from_pretrained(exported.folder)
    assert again.chat_template == tokenizer.chat_template
    assert again("hello world")["input_ids"] == [1, 2]


def test_a_base_model_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    base, adapter, _ = _search_result(tmp_path)
    (tmp_path / "base" / "vocab.txt").unlink()
    exported = export_adapter(base, adapter, tmp_path / "to", format="peft")
    (line,) = exported.notes()
    assert "no tokenizer or processor beside it: the folder has no tokenizer" in line
