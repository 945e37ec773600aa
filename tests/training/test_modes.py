from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from autopeft.training.modes import train_adapters_only


def test_dropout_acts_in_adapters_only(bert_with_lora: Callable[..., Any]) -> None:
    model = bert_with_lora(dropout=0.3).model
    model.train()
    train_adapters_only(model)
    active = {n for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.training}
    every = {n for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert active == {name for name in every if "lora_dropout" in name}
    assert active < every


def test_an_adapter_can_say_that_it_is_one() -> None:
    adapter = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    adapter.is_autopeft_adapter = True  # type: ignore[assignment]
    model = nn.Sequential(nn.Dropout(0.5), adapter)
    train_adapters_only(model)
    assert not model[0].training
    assert adapter[1].training
