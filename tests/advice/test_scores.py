"""The scores against values computed by hand, and PAGE against LoRAs that peft makes."""

from __future__ import annotations

import math
from dataclasses import replace

import peft
import pytest
import torch

from autopeft.advice.scores import SCORES, SiteRows, top_energy

ROWS = SiteRows(
    layer=3,
    weight=torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]),
    inputs=torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]]),
    gradient=torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]]),
    row_energy=6.0,
    rank=1,
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("depth", 3.0),
        ("gradient", math.sqrt(5.0)),
        ("top gradient", 4.0),
        ("PAGE", 4.0 * 6.0 / (3.0 * 2.0)),
        # |W| / sqrt(2) is 5 / sqrt(2): outputs are 3 and 4 times as long as their inputs.
        ("NFN", math.sqrt(2.0) / 5.0 * 3.5),
        ("EVA", 0.9),
        ("stable rank", 25.0 / 16.0),
    ],
)
def test_a_score_is_what_its_formula_says(name: str, value: float) -> None:
    assert SCORES[name].of(ROWS) == pytest.approx(value)


@pytest.mark.parametrize("name", ["EVA", "NFN", "stable rank"])
def test_a_score_that_does_not_exist_is_no_number(name: str) -> None:
    nothing = replace(ROWS, weight=torch.zeros(3, 2), inputs=torch.zeros(4, 2))
    assert math.isnan(SCORES[name].of(nothing))


def test_the_largest_singular_values_of_a_large_matrix_are_found() -> None:
    matrix = torch.randn(200, 90, generator=torch.Generator().manual_seed(0)) / torch.arange(1, 91)
    exact = float(torch.linalg.svdvals(matrix)[:4].square().sum())
    state = torch.get_rng_state()
    assert top_energy(matrix, 4) == pytest.approx(exact, rel=1e-3)
    assert top_energy(matrix, 4) == top_energy(matrix, 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_page_is_the_mean_energy_of_the_gradient_of_new_loras() -> None:
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(1, n, generator=generator) for n in (12, 5))
    base = torch.nn.Sequential(torch.nn.Linear(12, 5))
    energies = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"])
        adapted = peft.inject_adapter_in_model(config, base)
        layer = adapted[0]
        for _ in range(400):
            layer.reset_lora_parameters("default", True)
            adapted.zero_grad()
            (adapted(x) - target).square().sum().backward()
            energies.append(float(layer.lora_B["default"].weight.grad.square().sum()))
            assert not layer.lora_A["default"].weight.grad.any()
    gradient = 2.0 * (base(x) - target).detach().T @ x
    rows = SiteRows(0, torch.zeros(5, 12), x, gradient, float(gradient.square().sum()), 2)
    assert SCORES["PAGE"].of(rows) == pytest.approx(sum(energies) / len(energies), rel=0.1)
