from __future__ import annotations

import pytest
import torch
from tiny_models import (
    assert_same_state,
    batch_for,
    build,
    candidate_of,
    disturb,
    logits_of,
    state_of,
)

from autopeft.models.lora_compression import Trained
from autopeft.plan import AdapterPlan, LayerSpec

_SITES = ((0, "attn.q", "lora"), (1, "attn.v", "rslora"), (1, "mlp.down", "lora"))


def _plan(ranks: tuple[int, ...]) -> AdapterPlan:
    return AdapterPlan(LayerSpec(*site, rank) for site, rank in zip(_SITES, ranks, strict=True))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_cut_is_the_nearest_lora_of_its_rank(name: str) -> None:
    backbone = build(name)
    sites = [s for s in _SITES if backbone.topology.shape(s[0], s[1])]
    before = state_of(backbone)

    def plan(rank: int) -> AdapterPlan:
        return AdapterPlan(LayerSpec(*site, rank) for site in sites)

    with backbone.attach(candidate_of(plan(8)), seed=0) as attached:
        disturb(attached)
        trained = Trained(attached)
        whole = {p: _change(layer) for part in attached.parts for p, layer in part.layers.items()}
        head = [p.detach().clone() for p in attached.head_parameters()]
    with backbone.attach(candidate_of(plan(3)), seed=1) as cut:
        trained.cut_into(cut)
        for part in cut.parts:
            for path, layer in part.layers.items():
                left_out = (whole[path] - _change(layer)).norm()
                best = torch.linalg.svdvals(whole[path])[3:].norm()
                torch.testing.assert_close(left_out, best, rtol=1e-3, atol=1e-6)
        assert all(map(torch.equal, head, cut.head_parameters()))
    assert_same_state(before, state_of(backbone))


def test_a_cut_that_loses_nothing_gives_the_same_logits() -> None:
    backbone = build("bert")
    batch = batch_for(backbone)
    with backbone.attach(candidate_of(_plan((8, 8, 8))), seed=0) as attached:
        disturb(attached)
        with torch.no_grad():
            for part in attached.parts:
                for layer in part.layers.values():
                    layer.lora_A["default"].weight[2:] = 0.0
        logits = logits_of(attached.model, batch)
        trained = Trained(attached)
    with backbone.attach(candidate_of(_plan((2, 2, 4))), seed=5) as cut:
        assert not torch.allclose(logits_of(cut.model, batch), logits, atol=1e-3)
        trained.cut_into(cut)
        torch.testing.assert_close(logits_of(cut.model, batch), logits, rtol=1e-4, atol=1e-5)


def _change(layer: torch.nn.Module) -> torch.Tensor:
    change: torch.Tensor = layer.get_delta_weight("default").detach()
    return change
