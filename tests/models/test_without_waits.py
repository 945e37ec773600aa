"""What replaces parts of peft computes what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, WaveFTConfig, inject_adapter_in_model
from peft.tuners.adalora.layer import RankAllocator
from peft.tuners.vblora.layer import Linear as VbLoraLinear
from peft.tuners.waveft.layer import WaveFTLinear
from tiny_models import build, candidate_of, plan_of
from torch import nn

from autopeft.models.attach import attach
from autopeft.models.without_waits import Allocator, VbLoraLayer, WaveFtLayer


def _layer(config: Any, n_in: int = 12, n_out: int = 8) -> Any:
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(n_in, n_out)})
    return inject_adapter_in_model(config, model)["linear"]


@pytest.mark.parametrize("size", [(12, 8), (7, 5), (9, 16)])
@pytest.mark.parametrize("family", ["db1", "db3"])
def test_wavelets(family: str, size: tuple[int, int]) -> None:
    config = WaveFTConfig(
        n_frequency=20, target_modules=["linear"], wavelet_family=family, init_weights=False
    )
    layer = _layer(config, *size)
    expected = WaveFTLinear.get_delta_weight(layer, "default")
    WaveFtLayer.take_over(layer)
    found = layer.get_delta_weight("default")
    torch.testing.assert_close(found, expected)
    assert float(expected.detach().abs().max()) > 1e-3
    spectrum = layer.waveft_spectrum["default"]
    gradients = [torch.autograd.grad(x.square().sum(), spectrum)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_vector_banks() -> None:
    backbone = build("llama")
    plan = plan_of(backbone.topology, "vblora", seed=0)
    assert plan is not None
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        layers = [m for m in attached.model.modules() if isinstance(m, VbLoraLayer)]
        assert len(layers) == len(plan.specs)
        for layer in layers:
            layer.train()
            x = torch.randn(3, layer.in_features)
            assert torch.equal(layer(x), VbLoraLinear.forward(layer, x))
            assert layer.training


def test_rank_allocation() -> None:
    config = AdaLoraConfig(
        init_r=6, target_r=3, total_step=10, tinit=0, tfinal=1, deltaT=1, target_modules=["linear"]
    )
    kept = []
    for kind in (RankAllocator, Allocator):
        layer = _layer(config)
        model = nn.ModuleDict({"one": layer})
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter)
                parameter.grad = torch.randn_like(parameter)
        own: Any = kind(model, config, "default")
        own.reset_ipt()
        own.update_ipt(model)
        own.update_ipt(model)
        pattern = own.mask_to_budget(model, 3)
        (mask,) = pattern.values()
        kept.append(torch.as_tensor(mask).flatten().tolist())
        values = layer.lora_E["default"].detach().flatten()
        assert (values != 0).tolist() == kept[-1]
        layer.lora_E["default"].data.fill_(1.0)
        own.mask_using_rank_pattern(model, pattern)
        assert (layer.lora_E["default"] != 0).flatten().tolist() == kept[-1]
    assert kept[0] == kept[1]
    assert sum(kept[0]) == 3
