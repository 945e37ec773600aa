from __future__ import annotations

import gc
import itertools
import tracemalloc

import pytest
import torch
from covering import ARCHITECTURES, covering
from hypothesis import given, settings
from hypothesis import strategies as st
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

from autopeft import methods
from autopeft.costs import Topology, count_trainable, is_legal
from autopeft.errors import SpaceError
from autopeft.models.attach import attach
from autopeft.models.backbone import Backbone
from autopeft.plan import MODEL, AdapterPlan, Candidate, LayerSpec, TrainSettings

_FAMILIES = ("bert", "llama", "gpt2", "t5")
_BACKBONES: dict[str, Backbone] = {}


def _backbone(name: str) -> Backbone:
    if name not in _BACKBONES:
        _BACKBONES[name] = build(name)
    return _BACKBONES[name]


@pytest.mark.parametrize("name", _FAMILIES)
@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), dropout=st.sampled_from([0.0, 0.2]))
def test_any_plan_trains_what_was_priced_and_leaves_no_trace(
    name: str, seed: int, dropout: float
) -> None:
    backbone = _backbone(name)
    batch = batch_for(backbone)
    plan = random_plan(backbone.topology, seed)
    before = state_of(backbone)
    with attach(backbone, candidate_of(plan, dropout=dropout), seed=seed) as attached:
        live = {n: p for n, p in attached.model.named_parameters() if p.requires_grad}
        assert sum(p.numel() for p in live.values()) == count_trainable(backbone.topology, plan)
        grouped = [p for group in attached.parameter_groups() for p in group.parameters]
        assert {id(p) for p in grouped} == {id(p) for p in live.values()}
        assert len(grouped) == len(live)
        if live:
            attached.model.train()
            disturb(attached)
            attached.model(**batch).loss.backward()
            assert [n for n, p in live.items() if p.grad is None] == []
    assert_same_state(before, state_of(backbone))


def _site(topology: Topology, layer: int, role: str, method: str) -> list[LayerSpec]:
    """The method at one site, at size 4 or else the smallest that fits; [] if none does."""
    sizes = (4, *range(1, 48)) if methods.get(method).takes_rank else (0,)
    specs = (LayerSpec(layer, role, method, size) for size in sizes)
    return list(itertools.islice((spec for spec in specs if is_legal(topology, spec)), 1))


@pytest.mark.parametrize(
    ("method", "name"), covering([m.name for m in methods.all_methods()], ARCHITECTURES, each=3)
)
def test_a_method_starts_as_the_base_model_and_then_changes_it(method: str, name: str) -> None:
    backbone = _backbone(name)
    topology = backbone.topology
    batch = batch_for(backbone)
    specs = [
        spec
        for layer in range(topology.n_layers)
        for role in topology.roles(layer)
        for spec in _site(topology, layer, role, method)
    ]
    if not specs:
        pytest.skip(f"{name} has no site for {method}")
    with attach(backbone, candidate_of(AdapterPlan()), seed=3) as attached:
        base = logits_of(attached.model, batch)
    with attach(backbone, candidate_of(AdapterPlan(specs)), seed=3) as attached:
        first = logits_of(attached.model, batch)
        disturb(attached)
        later = logits_of(attached.model, batch)
    if not methods.get(method).starts_at_identity:
        assert not torch.equal(first, base)
        if methods.get(method).roles != (MODEL,):  # A prompt is no small change.
            torch.testing.assert_close(first, base, rtol=0.0, atol=0.05)
    elif not methods.get(method).exact_start:
        torch.testing.assert_close(first, base, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(first, base)
    assert float((first - later).abs().max()) > 1e-6


@pytest.mark.parametrize("method", [m.name for m in methods.all_methods() if "norm" not in m.roles])
def test_over_half_precision_adapters_are_trained_in_single(method: str) -> None:
    backbone = build("bert")
    backbone.model.to(torch.bfloat16)
    topology = backbone.topology
    layer = 0 if methods.get(method).roles == (MODEL,) else 1
    plan = AdapterPlan(
        spec for role in topology.roles(layer) for spec in _site(topology, layer, role, method)
    )
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        adapters = attached.parameter_groups()[0].parameters
        assert {p.dtype for p in adapters} == {torch.float32}
        attached.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = attached.model(**batch_for(backbone)).loss
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in adapters)


@pytest.mark.parametrize("method", [m.name for m in methods.all_methods()])
def test_under_autocast_a_method_gives_what_a_linear_layer_gives(method: str) -> None:
    """DeBERTa's own code fails where its queries are fp32 and its scores are not."""
    backbone = _backbone("deberta-v2")
    rank = 2 if methods.get(method).takes_rank else 0
    spec = LayerSpec(1, "attn.q", method, rank)
    if not is_legal(backbone.topology, spec):
        pytest.skip("nothing for queries")
    path = backbone.layout.modules[1, "attn.q"][0]
    with attach(backbone, candidate_of(AdapterPlan([spec])), seed=0) as attached:
        seen: list[torch.dtype] = []
        attached.model.get_submodule(path).register_forward_hook(
            lambda _module, _inputs, output: seen.append(output.dtype)
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = attached.model(**batch_for(backbone)).loss
        loss.backward()
        attached.model(**batch_for(backbone))
    assert seen == [torch.bfloat16, torch.float32]


def test_every_planned_site_is_adapted_once_and_no_other() -> None:
    backbone = _backbone("bert")
    plan = AdapterPlan(
        [
            LayerSpec(0, "attn.q", "lora", 2),
            LayerSpec(0, "attn.v", "lora", 4),
            LayerSpec(1, "attn.q", "dora", 2),
            LayerSpec(1, "mlp.down", "ia3"),
            LayerSpec(1, "norm", "ln_tuning"),
            LayerSpec(0, "mlp.up", "oft", 4),
            LayerSpec(1, "mlp.up", "oft", 8),
        ]
    )
    wanted = {
        path for spec in plan.specs for path in backbone.layout.modules[spec.layer, spec.role]
    }
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        found = {path for part in attached.parts for path in part.layers}
        assert found == wanted
        wrapped = {
            n for n, module in attached.model.named_modules() if hasattr(module, "base_layer")
        }
        assert wrapped == wanted
        by_method = [part.group.method.name for part in attached.parts]
        assert by_method == ["dora", "ia3", "ln_tuning", "lora", "oft", "oft"]
        assert attached.model.get_submodule("bert.encoder.layer.0.attention.self.value").r == {
            "default": 4
        }


def test_a_linear_module_by_another_class_name_is_one_to_every_method() -> None:
    backbone = _backbone("falcon")  # Its linear modules are of a class of their own.
    plan = AdapterPlan([LayerSpec(0, "attn.o", "glora", 2), LayerSpec(1, "mlp.up", "lora", 2)])
    before = state_of(backbone)
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        layers = [layer for part in attached.parts for layer in part.layers.values()]
        kinds = {type(layer.get_base_layer()).__name__ for layer in layers}
    assert kinds == {"FalconLinear"}
    assert_same_state(before, state_of(backbone))


def test_each_method_has_its_own_rate_and_so_has_the_head() -> None:
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 2), LayerSpec(1, "mlp.down", "ia3")])
    train = TrainSettings(3e-3, method_rates=(("lora", 1e-3), ("ia3", 9e-3), ("head", 2e-3)))
    with attach(_backbone("bert"), Candidate(plan, train), seed=0) as attached:
        groups = attached.parameter_groups()
    assert [(group.method, group.learning_rate) for group in groups] == [
        ("ia3", 9e-3),
        ("lora", 1e-3),
        ("head", 2e-3),
    ]


def test_the_seed_decides_every_initial_value_and_no_other_random_number() -> None:
    backbone = _backbone("bert")
    candidate = candidate_of(random_plan(backbone.topology, 4, share=0.8))

    def initial(seed: int) -> list[torch.Tensor]:
        with attach(backbone, candidate, seed=seed) as attached:
            groups = attached.parameter_groups()
            return [p.detach().clone() for group in groups for p in group.parameters]

    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, again, other = initial(1), initial(1), initial(2)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    # The head is the last group: its weight, then its zero bias.
    assert not torch.equal(first[-2], other[-2])
    assert first[-2].std() > 0.005


def test_a_plan_that_does_not_fit_leaves_the_base_alone() -> None:
    backbone = _backbone("bert")
    before = state_of(backbone)
    with pytest.raises(SpaceError, match="`1 <= rank <= 32`"):
        attach(backbone, candidate_of(AdapterPlan([LayerSpec(0, "attn.q", "lora", 33)])), seed=0)
    assert_same_state(before, state_of(backbone))
    assert backbone.attached is None


def test_one_candidate_at_a_time() -> None:
    backbone = _backbone("llama")
    candidate = candidate_of(random_plan(backbone.topology, 1))
    with attach(backbone, candidate, seed=0) as attached:
        with pytest.raises(RuntimeError, match="another candidate is attached"):
            attach(backbone, candidate, seed=0)
        attached.detach()
        attached.detach()
    with attach(backbone, candidate, seed=0):
        pass


def test_an_error_inside_detaches() -> None:
    backbone = _backbone("llama")
    before = state_of(backbone)
    candidate = candidate_of(random_plan(backbone.topology, 2))

    def fail() -> None:
        with attach(backbone, candidate, seed=0) as attached:
            attached.model.train()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert_same_state(before, state_of(backbone))


def test_many_candidates_leave_no_memory_behind() -> None:
    backbone = build("bert")
    candidates = [candidate_of(random_plan(backbone.topology, seed)) for seed in range(10)]

    def rounds(n: int) -> None:
        for i in range(n):
            attach(backbone, candidates[i % len(candidates)], seed=i).detach()
        gc.collect()

    rounds(20)
    tracemalloc.start()
    rounds(10)
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    n_objects = len(gc.get_objects())
    rounds(200)
    assert len(gc.get_objects()) < n_objects + 200
    assert before < 2**20
