from __future__ import annotations

import pytest
import torch
from tiny_models import KINDS, build
from torch import nn

from autopeft.errors import ModelError
from autopeft.models.layout import check_role_map, find_layout, role_by_name

_ALL = {"attn", "attn.o", "mlp.down", "norm", "block"}
_SPLIT = _ALL | {"attn.q", "attn.k", "attn.v", "mlp.up"}
_FUSED = _ALL | {"attn.qkv", "mlp.up"}
_GATED = _SPLIT | {"mlp.gate"}
_EXPERTS = {"experts.gate_up", "experts.down"}
_CROSS = {"cross.q", "cross.k", "cross.v", "cross.o"}
_ROLES = {
    "bert": _SPLIT,
    "roberta": _SPLIT,
    "distilbert": _SPLIT,
    "deberta-v2": _SPLIT - {"attn"},  # It computes its attention itself, and so does Falcon.
    "albert": _SPLIT,
    "modernbert": _ALL | {"attn.qkv", "mlp.gate_up"},
    "gpt2": _FUSED,
    "gpt_neox": _FUSED,
    "falcon": _FUSED - {"attn"},
    "llama": _GATED,
    "llama-cls": _GATED,
    "qwen3": _GATED,
    "gemma3": _GATED,
    "mistral": _GATED,
    "mixtral": _SPLIT - {"mlp.up", "mlp.down"} | _EXPERTS,
    "jamba": _GATED | _EXPERTS,
    "phi3": _ALL | {"attn.qkv", "mlp.gate_up"},
    "opt": _SPLIT,
    "t5": _SPLIT | _CROSS,
    "bart": _SPLIT | _CROSS,
    "whisper": _SPLIT | _CROSS,
    "vit": _SPLIT,
}


@pytest.mark.parametrize("name", sorted(KINDS))
def test_roles_of_a_family_are_found_on_meta(name: str) -> None:
    layout = build(name, device="meta").layout
    topology = layout.topology
    is_pair = "cross.q" in _ROLES[name]
    has_prompts = not is_pair and name != "vit"
    assert set(topology.shapes) == _ROLES[name] | ({"model"} if has_prompts else set())
    assert topology.n_layers == (4 if is_pair else 1 if name == "albert" else 2)
    assert topology.n_encoder_layers == (2 if is_pair else 0)
    assert topology.n_heads == 4


@pytest.mark.parametrize("name", sorted(KINDS))
def test_shapes_are_those_of_the_modules(name: str) -> None:
    backbone = build(name, device="meta")
    for (layer, role), paths in backbone.layout.modules.items():
        out, in_, *n_experts = backbone.topology.shape(layer, role) or (0, 0)
        if n_experts:
            (parameter,) = map(backbone.model.get_parameter, paths)
            assert parameter.shape == (*n_experts, out, in_)
            continue
        modules = [backbone.model.get_submodule(path) for path in paths]
        if role == "norm":
            assert out * in_ == sum(p.numel() for m in modules for p in m.parameters())
        elif role == "attn":
            assert (out, in_) == (4, backbone.layout.topology.shape(layer, "attn.o")[1])
        elif role == "model":
            assert layer == 0
            assert in_ == modules[0].get_input_embeddings().embedding_dim
        elif role != "block":
            assert [out * in_] == [m.weight.numel() for m in modules]
            sample = torch.empty(2, in_, device="meta")
            assert modules[0](sample).shape == (2, out)


def test_a_decoder_has_cross_attention_and_its_encoder_does_not() -> None:
    topology = build("t5", device="meta").topology
    assert [topology.shape(layer, "cross.q") for layer in range(4)] == [
        None,
        None,
        (32, 32),
        (32, 32),
    ]
    assert topology.shape(0, "norm") == (32, 2)
    assert topology.shape(2, "norm") == (32, 3)


def test_a_hybrid_has_the_roles_of_each_of_its_blocks() -> None:
    topology = build("jamba", device="meta").topology
    assert set(topology.roles(0)) == {"mlp.up", "mlp.gate", "mlp.down", "norm", "block", "model"}
    attention = {"attn.q", "attn.k", "attn.v", "attn.o", "attn"}
    assert set(topology.roles(1)) == attention | _EXPERTS | {"norm", "block"}


@pytest.mark.parametrize("name", sorted(KINDS))
def test_what_has_no_role_is_named_with_its_share(name: str) -> None:
    backbone = build(name, device="meta")
    layout = backbone.layout
    blocks = [backbone.model.get_submodule(path) for path in dict.fromkeys(layout.blocks)]
    with_role = {
        path: backbone.model.get_parameter(path if "experts" in role else f"{path}.weight").numel()
        for (_, role), own in layout.modules.items()
        if role not in ("norm", "attn", "block", "model")
        for path in own
    }
    tables = [m for block in blocks for m in block.modules() if isinstance(m, nn.Embedding)]
    n_rest = sum(p.numel() for block in blocks for p in block.parameters() if p.dim() > 1)
    n_rest -= sum(with_role.values()) + sum(table.weight.numel() for table in tables)
    # The parts sum to the whole.
    n_all = sum(p.numel() for block in blocks for p in block.parameters())
    assert sum(layout.unsearched.values()) * n_all == pytest.approx(n_rest, abs=0.5)
    expected = {"mixtral": ["mlp.gate"], "jamba": ["mamba.in_proj", "mamba.out_proj"]}
    assert [*layout.unsearched][: len(expected.get(name, []))] == expected.get(name, [])
    assert bool(layout.unsearched) == (name in expected)


def test_grouped_query_attention_has_narrower_keys() -> None:
    topology = build("llama", device="meta").topology
    assert topology.shapes["attn.q"] == (32, 32)
    assert topology.shapes["attn.k"] == (16, 32)


def test_conv1d_is_read_transposed_and_said_to_be() -> None:
    topology = build("gpt2", device="meta").topology
    assert topology.shapes["attn.qkv"] == (96, 32)
    assert topology.shapes["mlp.down"] == (32, 48)
    assert topology.transposed_roles == ("attn.qkv", "attn.o", "mlp.up", "mlp.down")


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("attention.self.query", "attn.q"),
        ("attention.output.dense", "attn.o"),
        ("intermediate.dense", "mlp.up"),
        ("output.dense", "mlp.down"),
        ("layer.1.EncDecAttention.k", "cross.k"),
        ("encoder_attn.out_proj", "cross.o"),
        ("attn.c_proj", "attn.o"),
        ("mlp.c_proj", "mlp.down"),
        ("layer.1.DenseReluDense.wi_0", "mlp.gate"),
        ("mlp.router", None),
    ],
)
def test_names_give_roles(path: str, role: str | None) -> None:
    assert role_by_name(path) == role


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Linear(8, 8)
        self.wide = nn.Linear(8, 16)
        self.narrow = nn.Linear(16, 8)
        self.scale = nn.LayerNorm(8)


class _OddModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ModuleList(_Odd() for _ in range(3))


def test_an_unknown_family_is_told_what_to_map() -> None:
    with pytest.raises(ModelError) as caught:
        find_layout(_OddModel())
    text = str(caught.value)
    assert "stack.*.mixer" in text
    assert "role_map" in text
    assert "\n" not in text


def test_a_role_map_makes_an_unknown_family_known() -> None:
    roles = {"blocks": "stack", "attn.v": "mixer", "mlp.up": "wide", "mlp.down": "narrow"}
    layout = find_layout(_OddModel(), role_map=roles)
    assert layout.topology.n_layers == 3
    assert layout.modules[2, "attn.v"] == ("stack.2.mixer",)
    assert layout.topology.shapes["mlp.up"] == (16, 8)
    assert layout.topology.shapes["norm"] == (8, 2)


def test_a_role_map_overrides_names() -> None:
    backbone = build("bert")
    layout = find_layout(backbone.model, role_map={"mlp.gate": "intermediate.dense"})
    assert layout.modules[0, "mlp.gate"] == ("bert.encoder.layer.0.intermediate.dense",)
    assert (0, "mlp.up") not in layout.modules


@pytest.mark.parametrize(
    "roles", [{"attn.z": "query"}, {"blocks": "nowhere"}, {"blocks": "stack.0"}]
)
def test_a_wrong_role_map_is_refused(roles: dict[str, str]) -> None:
    with pytest.raises(ModelError):
        find_layout(_OddModel(), role_map=roles)


@pytest.mark.parametrize(
    ("roles", "problem"),
    [
        (
            {"attn.q": "nope.nowhere"},
            "role_map='nope.nowhere': no linear module of a block has the path that attn.q is "
            "mapped to; use one of attention.self.query, ",
        ),
        ({"attn.q": ["query", "x"], "attn.k": ["a", "b"]}, "role_map='a, b': no linear module"),
        ({"norm": "query"}, "role_map='query': no norm of a block .*attention.output.LayerNorm"),
        ({"attn.q": "attention.self"}, "no linear module"),
        ({"mlp.up": "dense"}, "role_map='dense': mlp.up is one linear module .*several"),
        # BERT's own query has the role by its name.
        ({"attn.q": "intermediate.dense"}, "role_map='intermediate.dense': attn.q is one"),
    ],
)
def test_a_role_map_without_effect_is_refused(roles: dict[str, str], problem: str) -> None:
    """Regression: the prices were the same, with no word (issue 18)."""
    model = build("bert").model
    layout = find_layout(model, role_map=roles)  # As of an adapter that was saved with it.
    with pytest.raises(ModelError, match=problem) as refused:
        check_role_map(model, layout, roles)
    assert "\n" not in str(refused.value)


def test_a_role_map_with_an_effect_is_taken() -> None:
    model = build("bert").model
    for roles in (
        None,
        {"mlp.gate": "intermediate.dense"},
        {"attn.q": ["self.query", "mix.query"], "norm": "output.LayerNorm"},
        {"blocks": "bert.encoder.layer", "attn.o": "attention.output.dense"},
    ):
        check_role_map(model, find_layout(model, role_map=roles), roles)


def test_what_has_no_blocks_is_no_transformer() -> None:
    with pytest.raises(ModelError, match="is not a transformer"):
        find_layout(nn.Sequential(nn.Linear(4, 4)))
