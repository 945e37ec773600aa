from __future__ import annotations

import warnings

import pytest
import torch

from autopeft.errors import AutoPeftError
from autopeft.training.acceleration import TOLERANCE, verified, without_gradients

PLAIN = torch.tensor([1.0, -100.0])


@pytest.mark.parametrize("precision", TOLERANCE)
def test_rounding_is_accepted(precision: str) -> None:
    gap = 100 * TOLERANCE[precision] * torch.tensor([0.99, 0.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verified(PLAIN + gap, PLAIN, TOLERANCE[precision], what="it")


@pytest.mark.parametrize(
    ("fast", "tolerance"),
    [
        (PLAIN + torch.tensor([0.2, 0.0]), 1e-3),
        (PLAIN + torch.tensor([float("nan"), 0.0]), 1e-3),
        (PLAIN + torch.tensor([1e-6, 0.0]), 0.0),
    ],
)
def test_a_difference_is_reported(fast: torch.Tensor, tolerance: float) -> None:
    with pytest.warns(UserWarning, match=r"^it is off: results differ by .* of 1e\+02;"):
        assert not verified(fast, PLAIN, tolerance, what="it")
    with pytest.raises(AutoPeftError, match=r"^it is off: results differ"):
        verified(fast, PLAIN, tolerance, what="it", error=AutoPeftError)


def test_equal_results_are_exact() -> None:
    assert verified(PLAIN.clone(), PLAIN, 0.0, what="it")


def test_a_check_in_the_middle_of_a_pass_leaves_gradients_to_it() -> None:
    weight = torch.nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with without_gradients():
            assert not weight(torch.ones(1, 4)).requires_grad
        assert weight(torch.ones(1, 4)).requires_grad  # torch 2.6 kept the rounded weight.
