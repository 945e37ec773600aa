"""autopeft's own peft tuners: what they compute, and how peft and transformers take them."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.save_and_load import get_peft_model_state_dict
from tiny_models import (
    assert_same_state,
    batch_for,
    build,
    candidate_of,
    disturb,
    logits_of,
    random_plan,
    state_of,
)
from torch import nn

from autopeft import methods
from autopeft.costs import check_plan
from autopeft.errors import AdapterError, ModelError, SpaceError
from autopeft.models.attach import attach
from autopeft.models.export import export_merged
from autopeft.models.layout import find_layout
from autopeft.models.saving import load_adapter, save_adapter
from autopeft.models.sites import attention_shape
from autopeft.models.tuners import BottleneckConfig, GatedPrefixConfig, GatedPrefixLayer
from autopeft.plan import AdapterPlan, LayerSpec
from autopeft.training.trainer import train_adapters_only

_OWN = ("bottleneck", "parallel_bottleneck", "prefix")
_PATHS = {
    "bert": r".*attention\.self",
    "llama": r".*self_attn",
    "gpt2": r".*\.attn",
    "t5": r".*SelfAttention",
    "vit": r".*\.attention",
}


def _adapted(module: nn.Module, config: Any) -> Any:
    """A tuner's layer around one module, every adapter's value random."""
    holder = nn.Module()
    holder.add_module("m", module.requires_grad_(False))
    peft.inject_adapter_in_model(config, holder)
    layer = holder.get_submodule("m")
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    return layer


# --- bottlenecks -------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True])
def test_a_bottleneck_computes_what_its_paper_says(parallel: bool) -> None:
    torch.manual_seed(0)
    config = BottleneckConfig(r=3, target_modules=["m"], parallel=parallel, scaling=4.0)
    layer = _adapted(nn.Linear(6, 5), config)
    x = torch.randn(2, 7, 6)
    h = layer.base_layer(x)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    inner = torch.relu((x if parallel else h) @ down.weight.T + down.bias)
    expected = h + 4.0 * (inner @ up.weight.T + up.bias)
    torch.testing.assert_close(layer(x), expected)
    assert down.weight.shape == (3, 6 if parallel else 5)


def test_dropout_is_of_the_inner_values_and_only_while_training() -> None:
    torch.manual_seed(0)
    layer = _adapted(
        nn.Linear(6, 5), BottleneckConfig(target_modules=["m"], bottleneck_dropout=0.5)
    )
    x = torch.randn(4, 6)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_several_adapters_one_active_and_none() -> None:
    config = BottleneckConfig(r=2, target_modules=["0"], init_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    model.add_adapter("other", BottleneckConfig(r=3, target_modules=["0"], init_weights=False))
    x = torch.randn(2, 4)
    first = model(x)
    model.set_adapter("other")
    second = model(x)
    assert not torch.allclose(first, second)
    with model.disable_adapter():
        base = model(x)
    assert not torch.allclose(base, second)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all(".other." in name for name in names)
    saved = get_peft_model_state_dict(model, adapter_name="other")
    assert {key.split(".")[-2] for key in saved} == {"bottleneck_down", "bottleneck_up"}
    torch.testing.assert_close(model.unload()(x), base)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"r": 0}, "`r >= 1` must hold"), ({"non_linearity": "step"}, "no such non_linearity")],
)
def test_a_configuration_that_cannot_be_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _adapted(nn.Linear(4, 4), BottleneckConfig(target_modules=["m"], **arguments))


def test_only_linear_modules_have_bottlenecks() -> None:
    with (
        pytest.warns(UserWarning, match="Unsupported layer type"),
        pytest.raises(TypeError, match="linear module"),
    ):
        _adapted(nn.LayerNorm(4), BottleneckConfig(target_modules=["m"]))


# --- prefixes ----------------------------------------------------------------------------------


def _prefixed(name: str, size: int = 3) -> tuple[Any, list[GatedPrefixLayer]]:
    model: Any = build(name).model
    torch.manual_seed(1)
    config = GatedPrefixConfig(r=size, target_modules=_PATHS[name], init_weights=False)
    adapted = peft.inject_adapter_in_model(config, model)
    return adapted, [m for m in adapted.modules() if isinstance(m, GatedPrefixLayer)]


@pytest.mark.parametrize("name", sorted(_PATHS))
def test_a_prefix_computes_what_it_says(name: str) -> None:
    model, layers = _prefixed(name)
    layer: Any = layers[-1]
    seen: dict[str, torch.Tensor] = {}
    attended = layer.attended

    def spy(query: torch.Tensor, scaling: float) -> torch.Tensor:
        seen["query"], seen["scaling"] = query, torch.tensor(scaling)
        seen["added"] = attended(query, scaling)
        return seen["added"]

    layer.__dict__["attended"] = spy
    logits_of(model, batch_for(build(name)))
    keys, values, gates = (
        getattr(layer, f"gated_prefix_{what}")["default"] for what in ("keys", "values", "gates")
    )
    shares = torch.einsum("bhtd,hrd->bhtr", seen["query"], keys) * seen["scaling"]
    expected = torch.einsum("bhtr,hrd,h->bthd", shares.softmax(-1), values, gates.tanh())
    torch.testing.assert_close(seen["added"], expected)
    size = seen["query"].shape[-1]
    assert float(seen["scaling"]) == pytest.approx(1.0 if name == "t5" else size**-0.5)
    assert tuple(keys.shape) == (4, 3, 8)


@pytest.mark.parametrize("name", sorted(_PATHS))
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_prefix_works_with_any_attention_function(name: str, attention: str) -> None:
    model, _ = _prefixed(name)
    usual = logits_of(model, batch_for(build(name)))
    model.set_attn_implementation(attention)
    logits = logits_of(model, batch_for(build(name)))
    torch.testing.assert_close(logits, usual, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, GatedPrefixLayer):
                layer.gated_prefix_gates["default"].zero_()
    assert not torch.allclose(logits_of(model, batch_for(build(name))), logits, atol=1e-3)


def test_generating_with_a_cache_of_keys_gives_the_same_tokens() -> None:
    model, _ = _prefixed("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    kept = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    with_cache = model.generate(ids, use_cache=True, **kept)
    without = model.generate(ids, use_cache=False, **kept)
    assert torch.equal(with_cache, without)
    assert with_cache.shape[1] > 4


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_prefix_is_switched_off_and_taken_out_by_peft() -> None:
    base = build("llama").model
    batch = batch_for(build("llama"))
    plain = logits_of(base, batch)
    config = GatedPrefixConfig(r=2, target_modules=["self_attn"], init_weights=False)
    model = peft.PeftModel(base, config)
    assert not torch.allclose(logits_of(model, batch), plain, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, batch), plain)
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_adapter()
    assert torch.equal(logits_of(model.unload(), batch), plain)
    assert not any(isinstance(m, GatedPrefixLayer) for m in base.modules())


@pytest.mark.parametrize("is_prefixed", [True, False])
def test_a_block_is_compiled_whole_with_a_prefix_and_beside_one(is_prefixed: bool) -> None:
    """Attaching a prefix patches what all attentions of this process ask for their function."""
    model, _ = _prefixed("bert")
    if not is_prefixed:
        model = build("bert").model
    block, n_graphs = model.bert.encoder.layer[0], 0

    def backend(graph: Any, _inputs: Any) -> Any:
        nonlocal n_graphs
        n_graphs += 1
        return graph.forward

    states = torch.randn(2, 5, model.config.hidden_size)
    plain = block(states)
    torch.compiler.reset()
    compiled = torch.compile(block.forward, backend=backend, dynamic=True)(states)
    assert n_graphs == 1
    torch.testing.assert_close(compiled, plain)


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    gradients = []
    for is_checkpointed in (False, True):
        model, layers = _prefixed("llama")
        if is_checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**batch_for(build("llama"))).loss.backward()
        gradients.append([p.grad for p in layers[0].parameters() if p.requires_grad])
    assert len(gradients[0]) == 3
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_prefixes_in_two_threads_do_not_meet() -> None:
    model, _ = _prefixed("bert")
    plain = build("bert").model
    batch = batch_for(build("bert"))
    expected = [logits_of(model, batch), logits_of(plain, batch)]
    failures: list[int] = []

    def run(which: int) -> None:
        for _ in range(20):
            if not torch.equal(logits_of((model, plain)[which], batch), expected[which]):
                failures.append(which)

    threads = [threading.Thread(target=run, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_an_attention_that_ignores_the_table_is_noticed() -> None:
    model, layers = _prefixed("llama")
    attention = layers[0].base_layer
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(RuntimeError, match="its prefix was ignored"):
        logits_of(model, batch_for(build("llama")))


@pytest.mark.parametrize("name", ["deberta-v2", "falcon"])
def test_where_there_is_no_place_for_a_prefix_it_is_refused(name: str) -> None:
    backbone = build(name, device="meta")
    with pytest.raises(SpaceError, match="not computed by a function from transformers' table"):
        check_plan(backbone.topology, AdapterPlan([LayerSpec(0, "attn", "prefix", 2)]))
    found = [m for n, m in backbone.model.named_modules() if n.endswith(("self", "self_attention"))]
    assert found
    assert attention_shape(found[0]) is None
    with pytest.raises(TypeError, match="cannot have a prefix"):
        GatedPrefixLayer(found[0], "default")


def test_the_role_of_a_prefix_cannot_be_mapped() -> None:
    with pytest.raises(ModelError, match="is not a role that can be mapped"):
        find_layout(build("bert", device="meta").model, role_map={"attn": "query"})


# --- within autopeft -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_a_prefix_shares_its_attention_with_any_other_method(name: str, tmp_path: Path) -> None:
    backbone = build(name)
    before = state_of(backbone)
    batch = batch_for(backbone)
    kept = [s for s in random_plan(backbone.topology, 3, share=1.0).specs if s.role != "attn"]
    specs = [*kept, *(LayerSpec(i, "attn", "prefix", 2 + i) for i in range(2))]
    with attach(backbone, candidate_of(AdapterPlan(specs)), seed=0) as attached:
        assert {part.group.method.name for part in attached.parts} >= {"prefix"}
        assert len(attached.parts) > 2
        disturb(attached)
        logits = logits_of(attached.model, batch)
        save_adapter(attached, tmp_path, base_model="tiny")
        rates = [id(p) for group in attached.parameter_groups() for p in group.parameters]
        assert len(rates) == len(set(rates))
        with pytest.raises(AdapterError, match="cannot be merged"):
            export_merged(attached, tmp_path / "merged")
    assert_same_state(before, state_of(backbone))
    assert torch.equal(logits_of(load_adapter(build(name).model, tmp_path), batch), logits)
    (part,) = tmp_path.glob("part-*-prefix")
    tensors = peft.utils.load_peft_weights(str(part), device="cpu")
    assert all(".gated_prefix_" in key for key in tensors)
    assert len(tensors) == 6


@pytest.mark.parametrize("method", _OWN)
def test_adapters_train_and_the_base_does_not(method: str) -> None:
    backbone = build("bert")
    role = methods.get(method).roles[-1]
    with attach(backbone, candidate_of(AdapterPlan([LayerSpec(1, role, method, 2)])), seed=0) as a:
        train_adapters_only(a.model)
        layer = next(iter(a.parts[0].layers.values()))
        assert layer.training
        inner = [m for n, m in layer.named_modules() if n.startswith("base_layer")]
        assert inner
        assert not any(module.training for module in inner)


@pytest.mark.parametrize("method", _OWN)
def test_half_precision_works_in_training_and_without_autocast(method: str) -> None:
    backbone = build("llama")
    backbone.model.bfloat16()
    role = methods.get(method).roles[-1]
    plan = AdapterPlan([LayerSpec(i, role, method, 2) for i in range(2)])
    batch = batch_for(backbone)
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
        trained = [p for group in attached.parameter_groups() for p in group.parameters]
        assert {p.dtype for p in trained} == {torch.float32}
        assert attached.model(**batch).logits.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            attached.model(**batch).loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)


def test_no_module_of_an_adapter_is_taken_for_a_role() -> None:
    backbone = build("llama")
    plan = AdapterPlan(
        [
            LayerSpec(0, "mlp.down", "bottleneck", 2),
            LayerSpec(0, "mlp.up", "parallel_bottleneck", 2),
            LayerSpec(1, "attn", "prefix", 2),
        ]
    )
    usual = dict(backbone.layout.topology.shapes)
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        found = find_layout(attached.model).topology
        for layer in range(2):
            for role in found.roles(layer):
                if (shape := found.shape(layer, role)) is not None and role != "block":
                    assert shape == usual[role], (layer, role)


def test_peft_alone_loads_what_was_saved_once_the_tuners_are_imported(tmp_path: Path) -> None:
    backbone = build("llama")
    plan = AdapterPlan([LayerSpec(i, "attn", "prefix", 2 + i) for i in range(2)])
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
        logits = logits_of(attached.model, batch_for(backbone))
        save_adapter(attached, tmp_path / "adapter", base_model="tiny")
    backbone.model.save_pretrained(tmp_path / "base")
    torch.save((batch_for(backbone), logits), tmp_path / "expected")
    code = (
        "import sys, torch, peft, transformers, autopeft.models.tuners;"
        "base, adapter, expected = sys.argv[1:];"
        "model = transformers.AutoModelForCausalLM.from_pretrained(base);"
        "model = peft.PeftModel.from_pretrained(model, adapter).eval();"
        "batch, logits = torch.load(expected);"
        "print(torch.equal(model(**batch).logits, logits))"
    )
    places = [str(tmp_path / name) for name in ("base", "adapter", "expected")]
    done = subprocess.run(
        [sys.executable, "-c", code, *places], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == "True"
