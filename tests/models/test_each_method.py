"""Each method alone, at random sites of unlike models: price, start, gradients, files."""

from __future__ import annotations

import pytest
from covering import ARCHITECTURES, covering
from tiny_models import TINY_MODELS, plan_of

from autopeft import methods
from autopeft.testing import check_method


@pytest.mark.parametrize(
    ("method", "name"), covering([m.name for m in methods.all_methods()], ARCHITECTURES, each=2)
)
def test_a_method_keeps_its_word(method: str, name: str) -> None:
    if plan_of(TINY_MODELS[name].topology, method, seed=0) is None:
        pytest.skip(f"{name} has no site for {method}")
    check_method(method, models=[TINY_MODELS[name]])
