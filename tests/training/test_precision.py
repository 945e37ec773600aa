from __future__ import annotations

import pytest
import torch

from autopeft.errors import SettingsError
from autopeft.training.precision import MIN_GAIN, autocast, choose_precision

MODEL = torch.nn.Linear(2, 2)


def test_the_user_is_obeyed() -> None:
    assert choose_precision("fp32", "cpu", MODEL).precision == "fp32"
    assert choose_precision("bf16", "cpu", MODEL).precision == "bf16"


def test_auto_follows_its_measurement_and_keeps_it() -> None:
    choice = choose_precision("auto", "cpu", MODEL)
    gain = choice.measured_ms["fp32"] / choice.measured_ms["bf16"]
    assert (choice.precision == "bf16") == (gain > MIN_GAIN)
    assert choose_precision("auto", "cpu", MODEL) is choice


def test_unknown_precision() -> None:
    with pytest.raises(SettingsError, match="no such precision"):
        choose_precision("fp8", "cpu", MODEL)


def test_autocast_computes_in_what_it_says() -> None:
    layer, rows = torch.nn.Linear(4, 4), torch.ones(2, 4)
    with autocast("bf16", "cpu"):
        assert layer(rows).dtype == torch.bfloat16
    with autocast("fp32", "cpu"):
        assert layer(rows).dtype == torch.float32
