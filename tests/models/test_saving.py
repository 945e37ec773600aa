from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from covering import covering
from safetensors.torch import load_file, save_file
from tiny_models import (
    KINDS,
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

from autopeft import methods
from autopeft.errors import AdapterError, SettingsError
from autopeft.models.attach import attach
from autopeft.models.backbone import Backbone, load_backbone
from autopeft.models.method_hooks import no_boft_extension
from autopeft.models.saving import load_adapter, load_attached, save_adapter
from autopeft.plan import MODEL, AdapterPlan, Candidate, LayerSpec
from autopeft.utils.quiet import quiet_peft, quiet_transformers

_CLS = "AutoModelForSequenceClassification"


def _plan_of(backbone: Backbone, method: str, ranks: tuple[int, ...] = (2, 4)) -> AdapterPlan:
    own = methods.get(method).roles
    if own == (MODEL,):
        return AdapterPlan([LayerSpec(0, MODEL, method, ranks[0])])
    roles = [r for r in ("attn.q", "attn.qkv", "mlp.down", "attn", "norm") if r in own]

    def size(layer: int, role: str) -> int:
        """The rank, or the largest below that fits."""
        shape = backbone.topology.shape(layer, role)
        assert shape is not None
        wanted = ranks[layer % 2]
        return next(r for r in range(wanted, -1, -1) if methods.get(method).is_legal_rank(r, shape))

    def pool(role: str) -> int:
        return methods.get(method).pool(backbone.topology.shapes[role])

    roles = [r for r in roles if r in backbone.topology.shapes]
    return AdapterPlan(
        LayerSpec(layer, role, method, size(layer, role))
        for layer in range(2)
        for role in roles
        if pool(role) == pool(roles[0])  # Others would be another configuration.
    )


def _saved(backbone: Backbone, plan: AdapterPlan, folder: Path, **extra: Any) -> torch.Tensor:
    """Saves a disturbed candidate; gives its logits."""
    with attach(backbone, candidate_of(plan), seed=1) as attached:
        disturb(attached, seed=7)
        logits = logits_of(attached.model, batch_for(backbone))
        save_adapter(attached, folder, base_model="tiny", extra=extra)
    return logits


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "albert"])
@pytest.mark.parametrize("seed", range(3))
def test_a_mixed_plan_comes_back_with_the_same_logits(name: str, seed: int, tmp_path: Path) -> None:
    backbone = build(name)
    plan = random_plan(backbone.topology, seed, share=0.7)
    logits = _saved(backbone, plan, tmp_path)
    base = build(name).model
    loaded = load_adapter(base, tmp_path)
    assert torch.equal(logits_of(loaded, batch_for(backbone)), logits)
    assert not torch.equal(logits_of(backbone.model, batch_for(backbone)), logits)


@pytest.mark.parametrize(
    ("method", "name"), covering([m.name for m in methods.all_methods()], ["bert", "llama"], each=1)
)
def test_one_method_is_a_folder_that_peft_itself_loads(
    method: str, name: str, tmp_path: Path
) -> None:
    backbone = build(name)
    ranks = (2, 4) if methods.get(method).rank_pattern else (4, 4)
    logits = _saved(backbone, _plan_of(backbone, method, ranks), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "plan.json",
    }
    with quiet_peft(), no_boft_extension(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        theirs = peft.PeftModel.from_pretrained(build(name).model, str(tmp_path)).eval()
    # peft's AdaLoRA takes labels for a training it does not know of.
    batch = {name: t for name, t in batch_for(backbone).items() if name != "labels"}
    assert torch.equal(logits_of(theirs, batch), logits)
    assert torch.equal(
        logits_of(load_adapter(build(name).model, tmp_path), batch_for(backbone)), logits
    )


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "deft"])
def test_peft_loads_what_was_trained_over_conv1d(method: str, tmp_path: Path) -> None:
    backbone = build("gpt2")
    ranks = (2, 4) if methods.get(method).rank_pattern else (4, 4)
    logits = _saved(backbone, _plan_of(backbone, method, ranks), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        theirs = peft.PeftModel.from_pretrained(build("gpt2").model, str(tmp_path)).eval()
    torch.testing.assert_close(logits_of(theirs, batch_for(backbone)), logits)


@pytest.mark.parametrize("other", [None, '{"my": "notes"}'])
def test_a_peft_folder_is_loaded_without_our_plan(other: str | None, tmp_path: Path) -> None:
    backbone = build("llama")
    logits = _saved(backbone, _plan_of(backbone, "lora"), tmp_path)
    (tmp_path / "plan.json").unlink()
    if other is not None:
        (tmp_path / "plan.json").write_text(other)  # Another program's file.
    loaded = load_adapter(build("llama").model, tmp_path)
    assert isinstance(loaded, peft.PeftModel)
    assert torch.equal(logits_of(loaded, batch_for(backbone)), logits)


def test_a_lora_of_several_ranks_is_one_configuration(tmp_path: Path) -> None:
    backbone = build("llama")
    _saved(backbone, _plan_of(backbone, "lora", (2, 4)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] in (2, 4)
    assert len(config["rank_pattern"]) == 2
    other = 6 - config["r"]
    assert set(config["rank_pattern"].values()) == {other}
    assert set(config["alpha_pattern"].values()) == {2 * other}
    assert config["lora_alpha"] == 2 * config["r"]
    assert config["base_model_name_or_path"] == "tiny"


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_peft_scales_a_constant_alpha_by_each_rank_of_its_own(method: str, tmp_path: Path) -> None:
    backbone = build("llama")
    batch = batch_for(backbone)
    plan = _plan_of(backbone, method, (2, 8))
    candidate = Candidate(plan, replace(candidate_of(plan).train, alpha=12.0))
    with attach(backbone, candidate, seed=0) as attached:
        disturb(attached)
        logits = logits_of(attached.model, batch)
        save_adapter(attached, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    assert (config["lora_alpha"], config["alpha_pattern"]) == (12, {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        theirs = peft.PeftModel.from_pretrained(build("llama").model, str(tmp_path)).eval()
    torch.testing.assert_close(logits_of(theirs, batch), logits)


def test_a_mixed_plan_is_a_peft_folder_for_each_part(tmp_path: Path) -> None:
    backbone = build("bert")
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 2), LayerSpec(1, "mlp.up", "miss", 4)])
    _saved(backbone, plan, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "head.safetensors",
        "part-0-lora",
        "part-1-miss",
        "plan.json",
    }
    tensors = load_file(tmp_path / "part-0-lora" / "adapter_model.safetensors")
    query = "base_model.model.bert.encoder.layer.0.attention.self.query"
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        f"{query}.lora_A.weight": (2, 32),
        f"{query}.lora_B.weight": (32, 2),
    }
    assert set(load_file(tmp_path / "head.safetensors")) == {"classifier.weight", "classifier.bias"}


def test_a_head_alone_is_saved_and_loaded(tmp_path: Path) -> None:
    backbone = build("bert")
    logits = _saved(backbone, AdapterPlan(), tmp_path)
    assert torch.equal(
        logits_of(load_adapter(build("bert").model, tmp_path), batch_for(backbone)), logits
    )


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "llama-cls"])
def test_a_pretrained_model_gets_its_new_head_with_the_adapter(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(name, tmp_path / "base")
    backbone = load_backbone(folder, auto_class=_CLS, model_kwargs={"num_labels": 4})
    assert set(backbone.head) >= set(KINDS[name].head)
    plan = AdapterPlan([LayerSpec(1, "attn.v", "lora", 2)])
    with attach(backbone, candidate_of(plan), seed=1) as attached:
        disturb(attached)
        logits = logits_of(attached.model, _text())
        save_adapter(attached, tmp_path / "adapter", extra={"labels": ["a", "b", "c", "d"]})
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded = load_adapter("~/base", "~/adapter")
    assert torch.equal(logits_of(loaded, _text()), logits)
    assert logits.shape == (2, 4)
    row = json.loads((tmp_path / "adapter" / "plan.json").read_text())
    assert row["extra"] == {"labels": ["a", "b", "c", "d"]}
    assert row["base_model"] == folder
    assert row["model_kwargs"] == {"num_labels": 4}
    with quiet_transformers(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        base = hf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=4)
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert torch.equal(logits_of(theirs, _text()), logits)


def _text() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(3, 13).reshape(2, 5)}


def test_the_names_of_labels_come_back(tmp_path: Path) -> None:
    folder = save("bert", tmp_path / "base")
    names = {0: "no", 1: "maybe", 2: "yes"}
    kwargs = {"num_labels": 3, "id2label": names, "label2id": {n: i for i, n in names.items()}}
    backbone = load_backbone(folder, auto_class=_CLS, model_kwargs=kwargs)
    with attach(backbone, candidate_of(AdapterPlan()), seed=1) as attached:
        save_adapter(attached, tmp_path / "adapter")
    config = load_adapter(folder, tmp_path / "adapter").config
    assert config.id2label == names
    assert config.label2id == kwargs["label2id"]


class _Bomb:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return (_explode, ("code in a file was run",))


def _explode(text: str) -> None:
    raise AssertionError(text)


def _edit(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        row = json.loads((folder / "plan.json").read_text())
        row.update(changes)
        (folder / "plan.json").write_text(json.dumps(row))

    return spoil


def _edit_plan(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        row = json.loads((folder / "plan.json").read_text())
        row["plan"][0].update(changes)
        row["methods"] = {spec["method"]: 1 for spec in row["plan"]}
        (folder / "plan.json").write_text(json.dumps(row))

    return spoil


def _tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return spoil


def _pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(_Bomb()))


def _pickled_in_disguise(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(_Bomb()))


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[0]]


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name][:, :-1].contiguous()


def _each(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Changes every tensor of the file."""
    return _tensors(lambda tensors: tensors.update({n: change(t) for n, t in tensors.items()}))


_NO_NUMBERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "complex": (_each(lambda t: t * (1 + 1j)), "is complex64, and float32 is needed"),
    "whole numbers": (_each(lambda t: t.long()), "is int64, and float32 is needed"),
    "truth values": (_each(lambda t: t.bool()), "is bool, and float32 is needed"),
    "not a number": (_each(lambda t: t * float("nan")), "numbers that are not finite"),
    "beyond fp32": (_each(lambda t: (t.double() + 1) * 1e300), "numbers that are not finite"),
}
"""Spoiled tensors -> the message, in a folder of autopeft's or of another program."""


_SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown method": (_edit_plan(method="lorra"), "method='lorra': no such method"),
    "rank 0": (_edit_plan(rank=0), "`1 <= rank <= 32` must hold"),
    "rank too large": (_edit_plan(rank=33), "`1 <= rank <= 32` must hold"),
    "negative rank": (_edit_plan(rank=-1), "`0 <= rank <= "),
    "rank of text": (_edit_plan(rank="2"), "whole number"),
    "missing layer": (_edit_plan(layer=9), "the model has 2 blocks"),
    "missing role": (_edit_plan(role="mlp.gate"), "no such role"),
    "missing head": (_edit(head=["score"]), "lacks a module"),
    "not JSON": (lambda folder: (folder / "plan.json").write_text("{"), "is not JSON"),
    "not a mapping": (lambda f: (f / "plan.json").write_text("[1]"), "must be a mapping"),
    "head of text": (_edit(head="score"), "content.head='score': must be a list"),
    "no base": (_edit(base_model=None), "content.base_model=None: must be text"),
    "label of text": (_edit(model_kwargs={"id2label": {"a": "b"}}), "invalid literal"),
    "newer schema": (_edit(schema=99), "load it with the autopeft that saved it"),
    "newer method": (_edit(methods={"lora": 2}), "load it with the autopeft that saved it"),
    "foreign code": (_edit(model_kwargs={"trust_remote_code": True}), "is refused"),
    "foreign class": (_edit(auto_class="pipeline"), "is refused"),
    "pickle": (_pickled, "is a pickle"),
    "pickle in disguise": (_pickled_in_disguise, "is not a safetensors file"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "no such file"),
    "missing tensor": (_tensors(_drop), "lacks 1 tensors"),
    "tensor too many": (_tensors(lambda t: t.update(x=torch.ones(1))), "has 1 tensors too many"),
    "wrong shape": (_tensors(_reshape), "has shape"),
    **_NO_NUMBERS,
}


@pytest.mark.parametrize("case", sorted(_SPOILED))
def test_a_spoiled_adapter_is_refused_and_the_base_is_untouched(case: str, tmp_path: Path) -> None:
    spoil, message = _SPOILED[case]
    backbone = build("bert")
    _saved(backbone, _plan_of(backbone, "lora"), tmp_path)
    spoil(tmp_path)
    base = build("bert")
    base.model.requires_grad_(True)
    before = state_of(base)
    with pytest.raises(AdapterError) as caught:
        load_adapter(base.model, tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_same_state(before, state_of(base))


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"has no plan\.json"):
        load_adapter(build("bert").model, tmp_path)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
@pytest.mark.parametrize("kept", [[], ["embed_tokens", "lm_head"]])
def test_tokens_that_were_added_for_an_adapter_are_told(kept: list[str], tmp_path: Path) -> None:
    """The model that such an adapter names lacks them, so its name alone is no remedy."""
    base = save("llama", tmp_path / "base", with_head=True)
    larger: Any = hf.AutoModelForCausalLM.from_pretrained(base)
    larger.resize_token_embeddings(67)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=kept or None
    )
    with quiet_peft():
        peft.get_peft_model(larger, config).save_pretrained(tmp_path / "lora")
    with pytest.raises(AdapterError, match=r"67 tokens, .* of 60: tokens were added") as caught:
        load_adapter(base, tmp_path / "lora")
    assert "after model.resize_token_embeddings(67)" in str(caught.value)
    copy: Any = hf.AutoModelForCausalLM.from_pretrained(base)
    copy.resize_token_embeddings(67)
    copy.save_pretrained(tmp_path / "larger")
    load_adapter(tmp_path / "larger", tmp_path / "lora")


def test_a_foreign_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(AdapterError, match="is a pickle"):
        load_adapter(build("llama").model, tmp_path)


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    backbone = build("bert")
    _saved(backbone, _plan_of(backbone, "lora"), tmp_path)
    with pytest.raises(AdapterError):
        load_adapter(build("llama").model, tmp_path)


def test_what_was_loaded_can_be_detached(tmp_path: Path) -> None:
    backbone = build("llama")
    _saved(backbone, random_plan(backbone.topology, 1), tmp_path)
    base = build("llama").model
    plain = logits_of(base, batch_for(backbone))
    attached = load_attached(base, tmp_path)
    attached.detach()
    assert torch.equal(logits_of(base, batch_for(backbone)), plain)


@pytest.mark.parametrize("method", ["lora", "delora", "vera", "bottleneck", "prefix", "ln_tuning"])
def test_base_model_and_adapter_load_in_bf16(method: str, tmp_path: Path) -> None:
    folder = str(save("bert", tmp_path))
    options = {
        "auto_class": "AutoModelForSequenceClassification",
        "model_kwargs": {"num_labels": 3},
    }
    backbone = load_backbone(folder, **options)  # type: ignore[arg-type]
    logits = _saved(backbone, _plan_of(backbone, method), tmp_path / "adapter")
    model = load_adapter(folder, tmp_path / "adapter", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        found = model(**batch_for(backbone)).logits.float()
    torch.testing.assert_close(found, logits, rtol=0.05, atol=0.02)
    with pytest.raises(SettingsError, match="no such type; use one of float32"):
        load_adapter(folder, tmp_path / "adapter", dtype="int8")
    with pytest.raises(SettingsError, match="move the model itself"):
        load_adapter(backbone.model, tmp_path / "adapter", device="cpu")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "this"}, "sets megatron_config"),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, "sets tokenizer_kwargs"),
        ({"modules_to_save": 3}, "must be a list"),
        ({"modules_to_save": [1]}, "must be text"),
        ({"target_modules": "("}, "peft cannot load it"),
        ({"r": "x"}, "peft cannot load it"),
        ({"peft_type": "NONE"}, "is of the type NONE, which peft"),
    ],
)
def test_a_hostile_peft_folder_is_one_line(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    backbone = build("bert")
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 2)])
    save_adapter(attach(backbone, candidate_of(plan), seed=0), tmp_path)
    (tmp_path / "plan.json").unlink()
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AdapterError, match=problem) as caught:
        load_adapter(build("bert").model, tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors: tensors.pop(min(tensors)), "lacks 1 tensors, the first base_model.model"),
        (lambda tensors: tensors.update({"x.y": torch.zeros(1)}), "1 tensors, the first x.y"),
        (
            lambda tensors: tensors.update({n: torch.zeros(2, 5) for n in tensors if "_A" in n}),
            "does not fit the base model .*size mismatch",
        ),
    ],
)
def test_a_peft_folder_whose_tensors_do_not_fit_is_refused(
    change: Callable[[dict[str, torch.Tensor]], Any], problem: str, tmp_path: Path
) -> None:
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 2)])
    save_adapter(attach(build("bert"), candidate_of(plan), seed=0), tmp_path)
    (tmp_path / "plan.json").unlink()
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=problem):
        load_adapter(build("bert").model, tmp_path)


@pytest.mark.parametrize("case", sorted(_NO_NUMBERS))
def test_a_peft_folder_without_finite_numbers_is_refused(case: str, tmp_path: Path) -> None:
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 2)])
    save_adapter(attach(build("bert"), candidate_of(plan), seed=0), tmp_path)
    (tmp_path / "plan.json").unlink()
    spoil, problem = _NO_NUMBERS[case]
    spoil(tmp_path)
    with pytest.raises(AdapterError, match=f"base_model.model.*{problem}"):
        load_adapter(build("bert").model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_shorter_type_of_numbers_is_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 2)])
    save_adapter(attach(build("bert"), candidate_of(plan), seed=0), tmp_path)
    _each(lambda t: t.to(dtype))(tmp_path)
    load_adapter(build("bert").model, tmp_path)
    (tmp_path / "plan.json").unlink()
    load_adapter(build("bert").model, tmp_path)


def test_a_damaged_peft_file_is_one_line(tmp_path: Path) -> None:
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 2)])
    save_adapter(attach(build("bert"), candidate_of(plan), seed=0), tmp_path)
    (tmp_path / "plan.json").unlink()
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(AdapterError, match="is not a safetensors file"):
        load_adapter(build("bert").model, tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "problem"),
    [
        ({"num_labels": 10**9}, "num_labels <= 1000000"),
        ({"num_labels": "two"}, "must be a whole number"),
        ({"id2label": 3}, "must be a mapping"),
        ({"id2label": {"x": "a"}}, "invalid literal"),
        ({"label2id": {"a": "b"}}, "must be a whole number"),
    ],
)
def test_arguments_of_the_loader_are_checked(
    tmp_path: Path, kwargs: dict[str, Any], problem: str
) -> None:
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 2)])
    save_adapter(attach(build("bert"), candidate_of(plan), seed=0), tmp_path)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_kwargs": kwargs}))
    with pytest.raises(AdapterError, match=problem):
        load_adapter(build("bert").model, tmp_path)


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ({"dtype": ""}, "^dtype='': no such type"),
        ({"device": "gpu"}, "^device='gpu': torch knows no such device"),
        ({"device": "meta"}, "^device='meta': this machine has none"),
    ],
)
def test_a_type_or_device_that_does_not_exist_is_refused(
    where: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=named):
        load_adapter("no/such", tmp_path, **where)
