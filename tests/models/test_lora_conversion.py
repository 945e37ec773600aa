from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoHaConfig, PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file
from tiny_models import (
    assert_same_state,
    batch_for,
    build,
    candidate_of,
    disturb,
    logits_of,
    save,
    state_of,
)

from autopeft import methods
from autopeft.costs import Topology, is_legal
from autopeft.errors import AdapterError
from autopeft.models.attach import attach
from autopeft.models.backbone import load_backbone
from autopeft.models.export import export_adapter
from autopeft.models.lora_conversion import convert, export_lora, factorize
from autopeft.models.saving import save_adapter
from autopeft.plan import AdapterPlan, LayerSpec

# peft asks transformers for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

_CLS = "AutoModelForSequenceClassification"


def _mixed_plan(topology: Topology, names: list[str]) -> AdapterPlan:
    """One convertible method a linear site, in turn, at unlike ranks."""
    specs: list[LayerSpec] = []
    for layer in range(topology.n_layers):
        for role in topology.roles(layer):
            name = names[len(specs) % len(names)]
            spec = LayerSpec(layer, role, name, 2 + 2 * (layer % 2))
            if is_legal(topology, spec):
                specs.append(spec)
    return AdapterPlan(specs)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_a_mixed_plan_becomes_one_lora_that_peft_alone_loads(name: str, tmp_path: Path) -> None:
    backbone = build(name)
    plan = _mixed_plan(backbone.topology, ["lora", "miss", "rslora", "pissa", "lora_fa", "olora"])
    before, batch = state_of(backbone), batch_for(backbone)
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
        logits = logits_of(attached.model, batch)
        conversion = export_lora(attached, tmp_path)
        assert torch.equal(logits_of(attached.model, batch), logits)
    assert_same_state(before, state_of(backbone))
    assert conversion.lost == {}
    sites = {p for s in plan.specs for p in backbone.layout.modules[s.layer, s.role]}
    assert set(conversion.factors) == sites

    base = build(name)
    if base.head:
        for path in base.head:  # A new head is part of the adapter.
            head: Any = base.model.get_submodule(path)
            torch.nn.init.zeros_(head.weight)
    loaded: Any = PeftModel.from_pretrained(base.model, str(tmp_path))
    torch.testing.assert_close(logits_of(loaded, batch), logits, rtol=1e-4, atol=1e-5)


def test_the_files_are_what_servers_of_lora_expect(tmp_path: Path) -> None:
    backbone = build("llama")
    plan = AdapterPlan(
        [
            LayerSpec(0, "attn.q", "lora", 2),
            LayerSpec(0, "attn.v", "rslora", 8),
            LayerSpec(1, "mlp.down", "miss", 4),
        ]
    )
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
        export_lora(attached, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["bias"] == "none"
    assert not config["use_dora"]
    assert not config["use_rslora"]
    assert config["modules_to_save"] is None
    # One rank and one scaling for all, which servers take for granted.
    assert config["lora_alpha"] == config["r"] == 8
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {
        "model.layers.0.self_attn.q_proj": (2, 32, 32),
        "model.layers.0.self_attn.v_proj": (8, 32, 16),
        "model.layers.1.mlp.down_proj": (4, 48, 32),
    }
    assert set(config["target_modules"]) == set(shapes)
    expected: dict[str, tuple[int, ...]] = {}
    for path, (rank, in_, out) in shapes.items():
        a, b = f"base_model.model.{path}.lora_A.weight", f"base_model.model.{path}.lora_B.weight"
        expected |= {a: (8, in_), b: (out, 8)}
        assert not tensors[a][rank:].any()
        assert not tensors[b][:, rank:].any()
        assert tensors[a][:rank].any(dim=1).all()
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected


@pytest.mark.parametrize(
    ("method", "role", "why"),
    [
        ("ia3", "attn.q", "ia3 changes the weight"),
        ("oft", "attn.q", "rank 3"),
        ("ln_tuning", "norm", "not change a linear"),
    ],
)
def test_what_has_no_equal_lora_is_refused_by_name(
    method: str, role: str, why: str, tmp_path: Path
) -> None:
    backbone = build("bert")
    rank = 8 if methods.get(method).takes_rank else 0
    plan = AdapterPlan([LayerSpec(0, role, method, rank), LayerSpec(1, "attn.v", "lora", 2)])
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
        with pytest.raises(AdapterError, match=why) as caught:
            export_lora(attached, tmp_path / "strict", max_rank=3)
        for path in backbone.layout.modules[0, role]:
            assert path in str(caught.value)
        assert "--allow-lossy" in str(caught.value)
        assert not (tmp_path / "strict").exists()
        lossy = export_lora(attached, tmp_path / "lossy", max_rank=3, allow_lossy=True)
    assert set(lossy.lost) == set(backbone.layout.modules[0, role])
    loaded: Any = PeftModel.from_pretrained(build("bert").model, str(tmp_path / "lossy"))
    assert torch.isfinite(logits_of(loaded, batch_for(backbone))).all()


def test_a_rank_above_the_limit_is_refused_or_cut_to_the_nearest(tmp_path: Path) -> None:
    backbone = build("llama")
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 8)])
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
        with pytest.raises(AdapterError, match="rank 4"):
            export_lora(attached, tmp_path, max_rank=4)
        cut = convert(attached, max_rank=4)
        whole = convert(attached)
    (path,) = cut.factors
    assert cut.factors[path].rank == 4
    assert whole.factors[path].rank == 8
    best = torch.linalg.svdvals(whole.factors[path].b @ whole.factors[path].a)
    left_out = (
        whole.factors[path].b @ whole.factors[path].a - cut.factors[path].b @ cut.factors[path].a
    )
    torch.testing.assert_close(left_out.norm(), best[4:].norm(), rtol=1e-3, atol=1e-6)


@given(
    out=st.integers(2, 12), in_=st.integers(2, 12), rank=st.integers(1, 12), seed=st.integers(0, 99)
)
def test_factors_of_a_low_rank_change_are_exact_and_as_small_as_can_be(
    out: int, in_: int, rank: int, seed: int
) -> None:
    rank = min(rank, out, in_)
    generator = torch.Generator().manual_seed(seed)
    change = torch.randn(out, rank, generator=generator, dtype=torch.float64) @ torch.randn(
        rank, in_, generator=generator, dtype=torch.float64
    )
    found = factorize(change, max_rank=12)
    assert found.rank <= rank
    assert found.error == 0.0
    torch.testing.assert_close((found.b @ found.a).double(), change, rtol=1e-4, atol=1e-4)


def test_the_nearest_lora_is_that_of_pefts_own_conversion() -> None:
    path = "model.layers.0.self_attn.q_proj"
    model = get_peft_model(
        build("llama").model, LoHaConfig(r=4, target_modules=[path], init_weights=False)
    )
    change: torch.Tensor = model.get_submodule(f"base_model.model.{path}").get_delta_weight(
        "default"
    )
    _, tensors = convert_to_lora(model, rank=3)
    a, b = (tensors[f"base_model.model.{path}.lora_{which}.weight"] for which in "AB")
    found = factorize(change.detach(), max_rank=3)
    torch.testing.assert_close(found.b @ found.a, b @ a, rtol=1e-4, atol=1e-6)
    assert found.error > 0


def test_no_change_at_all_is_a_lora_of_rank_one() -> None:
    found = factorize(torch.zeros(3, 5), max_rank=4)
    assert (found.rank, found.error) == (1, 0.0)
    assert torch.equal(found.b @ found.a, torch.zeros(3, 5))


def test_a_saved_mixed_adapter_is_exported_and_its_logits_compared(tmp_path: Path) -> None:
    base = save("bert", tmp_path / "base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(55))]
    (tmp_path / "base" / "vocab.txt").write_text("\n".join(words))
    backbone = load_backbone(base, auto_class=_CLS, model_kwargs={"num_labels": 3})
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 2), LayerSpec(1, "attn.v", "miss", 4)])
    batch = batch_for(backbone)
    rows = {name: t for name, t in batch.items() if name != "labels"}
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
        save_adapter(attached, tmp_path / "adapter")
    for format_ in ("lora", "merged"):
        written = export_adapter(
            base, tmp_path / "adapter", tmp_path / format_, format=format_, rows=rows
        )
        assert written.folder == tmp_path / format_
        assert written.largest_difference is not None
        assert written.largest_difference < 1e-5
        assert written.n_rows == len(batch["labels"])
        assert written.lost == {}
