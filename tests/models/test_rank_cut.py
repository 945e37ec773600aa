"""Trained LoRAs cut to fewer parameters: what is kept, where, and that it is what is scored."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import (
    assert_same_state,
    batch_for,
    build,
    candidate_of,
    disturb,
    logits_of,
    state_of,
)

from autopeft.costs import count_trainable
from autopeft.errors import AdapterError
from autopeft.models.attach import Attached, attach
from autopeft.models.rank_cut import TrainedLora, global_cut
from autopeft.models.saving import load_attached, save_adapter
from autopeft.plan import AdapterPlan, LayerSpec

_SITES = ((0, "attn.q", "lora"), (1, "attn.v", "rslora"), (1, "mlp.down", "lora"))
_PLAN = AdapterPlan(LayerSpec(*site, 8) for site in _SITES)


def _plan(*ranks: int) -> AdapterPlan:
    return AdapterPlan(LayerSpec(*site, r) for site, r in zip(_SITES, ranks, strict=True) if r)


def _change(layer: torch.nn.Module) -> torch.Tensor:
    change: torch.Tensor = layer.get_delta_weight("default").detach()
    return change


def _changes(attached: Attached) -> dict[str, torch.Tensor]:
    return {path: _change(layer) for p in attached.parts for path, layer in p.layers.items()}


def _left_out(whole: dict[str, torch.Tensor], cut: dict[str, torch.Tensor]) -> float:
    """Squared norm of what a cut lacks, over all modules."""
    return sum(
        float((change - cut.get(path, torch.zeros(()))).square().sum())
        for path, change in whole.items()
    )


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_cut_is_the_nearest_lora_of_its_ranks(name: str) -> None:
    backbone = build(name)
    sites = [s for s in _SITES if backbone.topology.shape(s[0], s[1])]
    before = state_of(backbone)
    with attach(
        backbone, candidate_of(AdapterPlan(LayerSpec(*s, 8) for s in sites)), seed=0
    ) as attached:
        disturb(attached)
        trained, whole = TrainedLora(attached), _changes(attached)
        head = [p.detach().clone() for p in attached.head_parameters()]
    lower = AdapterPlan(LayerSpec(*site, 3) for site in sites)
    with attach(backbone, candidate_of(lower), seed=1) as cut:
        trained.cut_into(cut)
        for path, change in _changes(cut).items():
            best = torch.linalg.svdvals(whole[path])[3:].norm()
            torch.testing.assert_close((whole[path] - change).norm(), best, rtol=1e-3, atol=1e-6)
        assert all(map(torch.equal, head, cut.head_parameters()))
    assert_same_state(before, state_of(backbone))


def test_a_cut_that_loses_nothing_gives_the_same_logits() -> None:
    backbone = build("bert")
    batch = batch_for(backbone)
    with attach(backbone, candidate_of(_PLAN), seed=0) as attached:
        disturb(attached)
        with torch.no_grad():
            for part in attached.parts:
                for layer in part.layers.values():
                    layer.lora_A["default"].weight[2:] = 0.0
        logits = logits_of(attached.model, batch)
        trained = TrainedLora(attached)
    assert trained.cuts([4]) == (_plan(2, 2, 2),)  # Exactly what holds anything.
    with attach(backbone, candidate_of(_plan(2, 2, 4)), seed=5) as cut:
        assert not torch.allclose(logits_of(cut.model, batch), logits, atol=1e-3)
        trained.cut_into(cut)
        torch.testing.assert_close(logits_of(cut.model, batch), logits, rtol=1e-4, atol=1e-5)


def test_no_ranks_of_the_same_total_are_nearer(tmp_path: Path) -> None:
    backbone = build("bert")
    batch = batch_for(backbone)
    with attach(backbone, candidate_of(_PLAN), seed=0) as attached:
        disturb(attached)
        for part, factor in zip(attached.parts, (1.0, 3.0), strict=True):
            for layer in part.layers.values():
                layer.lora_B["default"].weight.data *= factor
        trained, whole = TrainedLora(attached), _changes(attached)

    def cut_to(plan: AdapterPlan) -> float:
        with attach(backbone, candidate_of(plan), seed=3) as cut:
            trained.cut_into(cut)
            return _left_out(whole, _changes(cut))

    head = count_trainable(backbone.topology, AdapterPlan())
    sizes = {
        p: count_trainable(backbone.topology, p) - head for p in (_PLAN, *trained.cuts([2, 6]))
    }
    total, *cut_sizes = sizes.values()
    for plan, size, divisor in zip([*sizes][1:], cut_sizes, (2, 6), strict=True):
        assert size <= total / divisor
        missed = cut_to(plan)
        for ranks in itertools.product(range(6), repeat=3):
            other = _plan(*ranks)
            if other.specs and count_trainable(backbone.topology, other) - head <= size:
                assert missed <= cut_to(other) * (1 + 1e-5)
    # The site that learned least has lost its adapter; what was cut is saved and loaded as any.
    assert len(plan.specs) < len(_PLAN.specs)
    with attach(backbone, candidate_of(plan), seed=1) as cut:
        trained.cut_into(cut)
        logits = logits_of(cut.model, batch)
        save_adapter(cut, tmp_path)
    loaded = load_attached(build("bert").model, tmp_path)
    assert loaded.candidate.plan == plan
    torch.testing.assert_close(logits_of(loaded.model, batch), logits)


def test_a_cut_of_everything_is_left_out() -> None:
    backbone = build("bert")
    with attach(backbone, candidate_of(_PLAN), seed=0) as attached:
        disturb(attached)
        trained = TrainedLora(attached)
        assert trained.cuts([10**6]) == ()
        assert trained.cuts([1]) == (_PLAN,)
        assert len(trained.cuts([2, 2])) == 1


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        (LayerSpec(1, "attn.q", "lora", 2), "no adapter"),
        (LayerSpec(0, "attn.q", "lora", 9), "lora of rank 8"),
        (LayerSpec(0, "attn.q", "rslora", 2), "lora of rank 8"),
    ],
)
def test_what_was_not_trained_cannot_be_cut(spec: LayerSpec, found: str) -> None:
    backbone = build("bert")
    with attach(backbone, candidate_of(_PLAN), seed=0) as attached:
        trained = TrainedLora(attached)
    with (
        attach(backbone, candidate_of(AdapterPlan([spec])), seed=0) as other,
        pytest.raises(AdapterError, match=f"layer {spec.layer}.*cut from {found}") as caught,
    ):
        trained.cut_into(other)
    assert "\n" not in str(caught.value)


def test_only_loras_are_cut() -> None:
    backbone = build("bert")
    with (
        attach(
            backbone, candidate_of(AdapterPlan([LayerSpec(0, "attn.q", "miss", 4)])), seed=0
        ) as attached,
        pytest.raises(AdapterError, match=r"miss.*cut a plan of LoRAs"),
    ):
        TrainedLora(attached)


@given(
    sites=st.lists(
        st.tuples(st.lists(st.floats(0.0, 9.0), min_size=1, max_size=3), st.integers(1, 5)),
        min_size=1,
        max_size=4,
    ),
    n_params=st.integers(0, 40),
)
def test_the_global_cut_keeps_the_most_for_its_size(
    sites: list[tuple[list[float], int]], n_params: int
) -> None:
    energies = [sorted(own, reverse=True) for own, _ in sites]
    sizes = [size for _, size in sites]

    def size_of(ranks: tuple[int, ...]) -> int:
        return sum(r * size for r, size in zip(ranks, sizes, strict=True))

    def kept(ranks: tuple[int, ...]) -> float:
        return sum(sum(own[:r]) for own, r in zip(energies, ranks, strict=True))

    found = tuple(global_cut(energies, sizes, n_params))
    assert size_of(found) <= n_params
    for ranks in itertools.product(*(range(len(own) + 1) for own in energies)):
        if size_of(ranks) <= size_of(found):
            assert kept(ranks) <= kept(found) + 1e-9
    # Another direction would not have fitted.
    spare = n_params - size_of(found)
    assert spare < max(sizes) or found == tuple(map(len, energies))
