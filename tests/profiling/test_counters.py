from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autopeft.profiling.counters import (
    first_tensor,
    new_source,
    run_and_count,
    storage_id,
    tensors_in,
)


def test_flops_are_flop_counter_modes() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    x = torch.ones(5, 8, requires_grad=True)
    run = run_and_count(lambda: model(x), not_kept=model)
    with FlopCounterMode(display=False) as counter:
        result = model(x)
        forward = counter.get_total_flops()
        result.sum().backward()
    assert run.forward_flops == forward == 2 * 5 * (8 * 16 + 16 * 4)
    assert run.forward_flops + run.backward_flops == counter.get_total_flops()


def test_what_is_kept_counts_once_and_weights_do_not() -> None:
    model = nn.Linear(8, 16)
    x = torch.ones(5, 8)
    run = run_and_count(lambda: model(x) + model(x[:, :]), not_kept=model)
    assert run.saved_bytes == 5 * 8 * 4
    assert run.kept == {storage_id(x)}


def test_shared_tensors_are_told_apart() -> None:
    x = torch.ones(5, 8, requires_grad=True)
    mask = torch.ones(5, 8)
    run = run_and_count(lambda: x * mask, not_kept=nn.Module(), shared={storage_id(mask): 160.0})
    assert run.saved_bytes == 0
    assert run.kept_shared == {storage_id(mask)}


def test_what_was_saved_and_dropped_is_not_kept() -> None:
    x = torch.ones(5, 8, requires_grad=True)

    def forward() -> torch.Tensor:
        (x.exp() * x.sin()).detach()
        return x.exp()

    assert run_and_count(forward, not_kept=nn.Module()).saved_bytes == 5 * 8 * 4


def test_nothing_to_learn_costs_no_backward_pass() -> None:
    model = nn.Linear(8, 16).requires_grad_(False)
    run = run_and_count(lambda: model(torch.ones(5, 8)), not_kept=model)
    assert (run.backward_flops, run.saved_bytes) == (0, 0)


def test_a_source_may_be_changed_in_place() -> None:
    source = new_source(torch.ones(2, requires_grad=True) * 3)
    source += 1
    assert source.requires_grad
    assert source.tolist() == [4, 4]


def test_tensors_are_found_in_nested_values() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    assert [t.numel() for t in tensors_in((a, {"x": [b, None, "text"]}, c))] == [1, 2, 3]
    assert first_tensor([{"x": b}, a]) is b
