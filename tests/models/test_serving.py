"""Exports as servers would load them: by loaders that share no code with the table of rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_servers import Refused, as_llama_cpp, as_sglang, as_vllm
from safetensors.torch import load_file
from tiny_models import batch_for, build, candidate_of, disturb, logits_of, save

from autopeft.errors import AdapterError, SettingsError
from autopeft.models.attach import attach
from autopeft.models.backbone import load_backbone
from autopeft.models.export import Exported, export_adapter
from autopeft.models.lora_conversion import convert, export_lora
from autopeft.models.saving import save_adapter
from autopeft.plan import AdapterPlan, LayerSpec
from autopeft.serving.servers import SERVERS, check_export

# peft asks transformers for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

_MIXED = AdapterPlan(
    [
        LayerSpec(0, "attn.q", "lora", 2),
        LayerSpec(0, "attn.k", "rslora", 5),
        LayerSpec(0, "attn.v", "rslora", 9),
        LayerSpec(1, "attn.q", "pissa", 3),
        LayerSpec(1, "mlp.down", "miss", 4),
        LayerSpec(1, "mlp.up", "loha", 2),
    ]
)
_LOADERS: dict[str, Any] = {"vllm": as_vllm, "sglang": as_sglang}


def _saved(
    folder: Path, plan: AdapterPlan = _MIXED, *, kind: str = "llama"
) -> tuple[str, Path, Any, dict[str, torch.Tensor]]:
    """A base model, a trained adapter of it, the adapter's logits, and the rows."""
    base = save(kind, folder / "base", with_head=True)
    backbone = load_backbone(base, auto_class=build(kind).auto_class)
    rows = {name: t for name, t in batch_for(backbone).items() if name != "labels"}
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
        logits = logits_of(attached.model, rows)
        save_adapter(attached, folder / "adapter")
    return base, folder / "adapter", logits, rows


def _base(folder: str, *, kind: str = "llama") -> Any:
    return load_backbone(folder, auto_class=build(kind).auto_class).model


def _effect(base: Any, rows: Any, logits: torch.Tensor) -> float:
    return float((logits_of(base, rows) - logits).abs().max())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("server", list(_LOADERS))
def test_a_mixed_plan_is_served_with_the_adapters_logits(
    server: str, kind: str, tmp_path: Path
) -> None:
    specs = (
        _MIXED.specs
        if kind == "llama"
        else (LayerSpec(0, "attn.qkv", "rslora", 5), LayerSpec(1, "mlp.down", "lora", 2))
    )
    base, adapter, logits, rows = _saved(tmp_path, AdapterPlan(specs), kind=kind)
    exported = export_adapter(base, adapter, tmp_path / "served", server=server, rows=rows)
    assert _effect(_base(base, kind=kind), rows, logits) > 0.05
    served = _LOADERS[server](_base(base, kind=kind), exported.folder)
    torch.testing.assert_close(logits_of(served, rows), logits, rtol=1e-4, atol=1e-5)
    assert exported.largest_difference == pytest.approx(0.0, abs=1e-5)
    assert check_export(exported.folder, server) == []


def test_what_llama_cpps_converter_reads_of_a_lora_is_right_too(tmp_path: Path) -> None:
    base, adapter, logits, rows = _saved(tmp_path)
    exported = export_adapter(base, adapter, tmp_path / "lora", format="lora")
    served = as_llama_cpp(_base(base), exported.folder)
    torch.testing.assert_close(logits_of(served, rows), logits, rtol=1e-4, atol=1e-5)


def test_the_rank_for_vllm_is_one_that_it_can_reserve(tmp_path: Path) -> None:
    base, adapter, _, _ = _saved(tmp_path)
    exported = export_adapter(base, adapter, tmp_path / "served", server="vllm")
    assert exported.rank == 16
    assert f"vllm serve {base} --enable-lora --max-lora-rank 16 " in exported.serve
    with pytest.raises(AdapterError, match="takes ranks up to 512"):
        SERVERS["vllm"].rank_for(513)
    assert SERVERS["sglang"].rank_for(9) == 9


@pytest.mark.parametrize(
    ("server", "loader"), [("vllm", as_vllm), ("sglang", as_sglang), ("llamacpp", as_llama_cpp)]
)
def test_unlike_ranks_as_peft_writes_them_are_found_to_be_served_wrongly(
    server: str, loader: Any, tmp_path: Path
) -> None:
    plan = AdapterPlan(
        [
            LayerSpec(0, "attn.q", "rslora", 2),
            *(LayerSpec(1, f"attn.{r}", "rslora", 8) for r in "kv"),
        ]
    )
    base, adapter, logits, rows = _saved(tmp_path, plan)
    try:
        is_wrong = _effect(loader(_base(base), adapter), rows, logits) > 1e-3
    except Refused:
        is_wrong = True
    assert is_wrong
    assert check_export(adapter, server)


def test_experts_are_padded_as_peft_lays_them_out(tmp_path: Path) -> None:
    backbone = build("mixtral")
    plan = AdapterPlan(
        [LayerSpec(0, "experts.gate_up", "lora", 2), LayerSpec(1, "experts.down", "lora", 4)]
    )
    batch = batch_for(backbone)
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
        logits = logits_of(attached.model, batch)
        found = convert(attached).factors
        export_lora(attached, tmp_path)
    assert {f.padded(6).rank for f in found.values()} == {6}
    from peft import PeftModel

    loaded: Any = PeftModel.from_pretrained(build("mixtral").model, str(tmp_path))
    torch.testing.assert_close(logits_of(loaded, batch), logits, rtol=1e-4, atol=1e-5)


def test_a_new_head_is_a_file_of_its_own_where_the_server_loads_none(tmp_path: Path) -> None:
    base = save("bert", tmp_path / "base")
    auto_class = build("bert").auto_class
    backbone = load_backbone(base, auto_class=auto_class, model_kwargs={"num_labels": 3})
    rows = {name: t for name, t in batch_for(backbone).items() if name != "labels"}
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 2), LayerSpec(1, "attn.v", "rslora", 4)])
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
        logits = logits_of(attached.model, rows)
        save_adapter(attached, tmp_path / "adapter")
    exported = export_adapter(base, tmp_path / "adapter", tmp_path / "to", server="vllm", rows=rows)
    assert exported.head_file == "head.safetensors"
    assert exported.largest_difference == pytest.approx(0.0, abs=1e-5)
    assert any("head.safetensors" in line for line in exported.notes())
    model: Any = load_backbone(base, auto_class=auto_class, model_kwargs={"num_labels": 3}).model
    model.load_state_dict(load_file(exported.folder / "head.safetensors"), strict=False)
    served = as_vllm(model, exported.folder)
    torch.testing.assert_close(logits_of(served, rows), logits, rtol=1e-4, atol=1e-5)
    inside = export_adapter(base, tmp_path / "adapter", tmp_path / "peft", server="peft", rows=rows)
    assert inside.head_file == ""
    assert inside.largest_difference == pytest.approx(0.0, abs=1e-5)
    assert any("modules_to_save" in line for line in check_export(inside.folder, "vllm"))


@pytest.mark.parametrize("server", ["mlx", "transformers"])
def test_who_loads_whole_models_gets_one(server: str, tmp_path: Path) -> None:
    base, adapter, _, rows = _saved(tmp_path)
    exported: Exported = export_adapter(base, adapter, tmp_path / "to", server=server, rows=rows)
    assert exported.format == "merged"
    assert exported.largest_difference == pytest.approx(0.0, abs=1e-5)
    assert check_export(exported.folder, server) == []
    assert check_export(adapter, server)


def test_a_server_and_another_format_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--for vllm writes lora; drop --format"):
        export_adapter("base", "adapter", tmp_path / "to", server="vllm", format="merged")
    with pytest.raises(SettingsError, match="did you mean 'vllm'"):
        export_adapter("base", "adapter", tmp_path / "to", server="vlm")


def test_what_a_server_has_no_place_for_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    plan = AdapterPlan([LayerSpec(0, "experts.down", "lora", 4)])
    base, adapter, _, _ = _saved(tmp_path, plan, kind="mixtral")
    with pytest.raises(AdapterError, match="adapts no bare parameters"):
        export_adapter(base, adapter, tmp_path / "to", server="vllm")
    assert not (tmp_path / "to").exists()
