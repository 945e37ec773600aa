from __future__ import annotations

import pytest
import torch
from tiny_models import assert_same_state, batch_for, build, candidate_of, disturb, state_of

from autopeft import methods
from autopeft.costs import Topology, is_legal
from autopeft.models.attach import Attached, attach
from autopeft.models.backbone import Backbone
from autopeft.models.multi_adapter import MultiAdapter, can_share_batch, can_share_batch_in
from autopeft.plan import MODEL, AdapterPlan, Candidate, LayerSpec

_LORAS = ("lora", "rslora", "lora_fa")
_MIXED = tuple(m.name for m in methods.all_methods() if not m.draws_noise)


def _plan(topology: Topology, names: tuple[str, ...], seed: int) -> AdapterPlan:
    """Several sites, each with a method, and few enough that others stay bare."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    specs: dict[tuple[int, str], LayerSpec] = {}
    for layer in range(topology.n_layers):
        for role in topology.roles(layer):
            name = names[draw(len(names))]
            method = methods.get(name)
            shape = topology.shape(layer, role)
            assert shape is not None
            ranks = [r for r in (0, 1, 2, 3, 4, 8) if method.is_legal_rank(r, shape)]
            if role in (MODEL, "attn") or not ranks or draw(3) == 0:
                continue
            spec = LayerSpec(layer, role, name, ranks[draw(len(ranks))])
            if is_legal(topology, spec):
                specs[layer, role] = spec
    return AdapterPlan(specs.values())


def _lanes(backbone: Backbone, candidates: list[Candidate]) -> dict[int, Attached]:
    lanes = {}
    for index, candidate in enumerate(candidates):
        lanes[index] = attach(backbone, candidate, seed=index)
        disturb(lanes[index], seed=index)
        lanes[index].park()
    return lanes


def _parameters(lane: Attached) -> list[torch.nn.Parameter]:
    return [p for group in lane.parameter_groups() for p in group.parameters]


def _gradients(lane: Attached) -> list[torch.Tensor]:
    found = []
    for parameter in _parameters(lane):
        assert parameter.grad is not None
        found.append(parameter.grad)
        parameter.grad = None
    return found


@pytest.mark.parametrize("names", [_LORAS, _MIXED], ids=["loras", "any method"])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5", "vit"])
def test_packed_outputs_and_gradients_are_those_alone(kind: str, names: tuple[str, ...]) -> None:
    backbone = build(kind)
    before = state_of(backbone)
    plans = [_plan(backbone.topology, names, seed) for seed in range(3)]
    candidates = [candidate_of(plan) for plan in plans]
    assert all(can_share_batch(c) and can_share_batch_in(c, backbone.layout) for c in candidates)
    lanes = _lanes(backbone, candidates)
    pack = MultiAdapter(lanes)
    batch = batch_for(backbone)
    alone: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
    for index in lanes:
        with pack.alone(index) as model:
            logits = model(**batch).logits
            logits.square().mean().backward()
        alone.append((logits.detach(), _gradients(lanes[index])))
    three = {name: torch.cat([rows] * 3) for name, rows in batch.items()}
    with pack.placed() as model:
        packed = model(**three).logits
        torch.stack([part.square().mean() for part in packed.chunk(3)]).sum().backward()
    for index, part in enumerate(packed.detach().chunk(3)):
        logits, gradients = alone[index]
        torch.testing.assert_close(part, logits, rtol=1e-4, atol=1e-5)
        for got, expected in zip(_gradients(lanes[index]), gradients, strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-5)
    for lane in lanes.values():
        lane.detach()
    assert_same_state(before, state_of(backbone))
