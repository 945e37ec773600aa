"""One place knows what kinds of accelerators there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from pretended_device import is_marked, pretended

import autopeft
from autopeft.errors import SettingsError
from autopeft.utils.device import (
    RandomState,
    accelerator,
    checked_device,
    drawn_on_host,
    is_here,
    kind_of,
    n_accelerators,
    sent,
    supports_bf16,
)

PACKAGE = Path(autopeft.__file__).parent


def _code(path: Path) -> list[str]:
    """The lines of a file, without its examples."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if ">>> " not in line]


def test_nothing_else_names_a_kind_of_accelerator() -> None:
    kinds = re.compile(
        r"""["'`](cuda|xpu|mps|hip|npu)\b|torch\.(cuda|xpu|mps|accelerator)\b|is_cuda"""
    )
    places = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(kinds.search(line) for line in _code(path))
    }
    assert places == {"utils/device.py"}


def test_a_machine_with_an_accelerator_and_one_without() -> None:
    with pretended():
        assert accelerator() == "cuda"
        assert n_accelerators() == 1
        assert is_here("cuda:0")
        assert is_here("cpu")
        assert not is_here("xpu")
        assert supports_bf16("cuda")
        assert kind_of("cuda") == kind_of("mps") == "accelerator"
    assert kind_of("cpu") == "cpu"
    if not torch.accelerator.is_available():
        assert accelerator() is None
        assert n_accelerators() == 0
        assert not is_here("cuda")


def test_the_pretended_device_finds_mixed_tensors_and_waits() -> None:
    with pretended() as world:
        there, here = torch.ones(3).to("cuda"), torch.ones(3)
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            there + here
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            there.numpy()
        world.clear()
        reads = [
            lambda: there.sum().item(),
            lambda: there.tolist(),
            lambda: there.cpu(),
            lambda: there[there > 0],
            lambda: there[torch.tensor([0])],
            lambda: there.copy_(here),
            lambda: there + torch.tensor([1.0], device="cuda"),
        ]
        for number, read in enumerate(reads, 1):
            read()
            assert sum(world.waits.values()) == number
        assert is_marked(there * 2 + 1)
        assert not is_marked(there.cpu())


def test_nobody_waits_for_what_is_sent() -> None:
    with pretended() as world:
        there = sent(torch.arange(3), "cuda")
        assert is_marked(there)
        assert world.copies == 1
        assert not world.waits
        torch.arange(3).to("cuda")
        assert sum(world.waits.values()) == 1


def _draw(device: str) -> list[torch.Tensor]:
    weight = torch.nn.Linear(3, 2, device=device).weight
    torch.nn.init.xavier_normal_(weight)
    return [weight, torch.randn(2, device=device), torch.randperm(4, device=device)]


def test_values_drawn_on_the_host_are_the_same_on_any_device() -> None:
    with drawn_on_host(3):
        expected = _draw("cpu")
    with pretended():
        states = torch.get_rng_state(), torch.cuda.get_rng_state()
        with drawn_on_host(3):
            drawn = _draw("cuda")
            torch.manual_seed(0)  # As peft does here and there.
        assert all(map(is_marked, drawn))
        for there, here in zip(drawn, expected, strict=True):
            assert torch.equal(there.cpu(), here)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert torch.equal(torch.cuda.get_rng_state(), states[1])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_random_stream_goes_on_where_it_was(device: str) -> None:
    with pretended():
        whole, halves = RandomState(5, device), RandomState(5, device)
        with whole.resumed():
            expected = torch.rand(4, device=device)
        with halves.resumed():
            first = torch.rand(2, device=device)
        torch.rand(3, device=device)
        with halves.resumed():
            second = torch.rand(2, device=device)
        assert torch.cat([first, second]).tolist() == expected.tolist()


def test_a_device_that_is_not_here_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [checked_device(place) for place in ("cpu", torch.device("cpu"))] == ["cpu", "cpu"]
    with pytest.raises(SettingsError, match=r"^device='meta': this machine has none; use cpu"):
        checked_device("meta")
    for wrong in ("", "gpu", "cuda:", 2.5):
        with pytest.raises(SettingsError, match="torch knows no such device; use cpu"):
            checked_device(wrong)  # type: ignore[arg-type]
    monkeypatch.setattr("autopeft.utils.device.accelerator", lambda: "cuda")
    monkeypatch.setattr("autopeft.utils.device.n_accelerators", lambda: 2)
    assert [checked_device(place) for place in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]
    for beyond in ("cuda:2", "xpu"):
        with pytest.raises(SettingsError, match=r"this machine has none; use cpu or cuda$"):
            checked_device(beyond)
