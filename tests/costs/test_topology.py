"""A topology written by hand is checked when it is made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from autopeft.costs import Topology
from autopeft.errors import SpaceError

SHAPES = {"attn.q": (64, 64)}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"n_layers": 2.5}, "n_layers=2.5: must be a whole number"),
        ({"n_layers": -1}, "n_layers=-1"),
        ({"n_layers": True}, "n_layers=True"),
        ({"head_params": "9"}, "head_params='9'"),
        ({"shapes": None}, "shapes=None: must be a mapping"),
        ({"shapes": {"attn.q": 64}}, r"shapes\['attn.q'\]=64: must be \(out, in\)"),
        ({"shapes": {"attn.q": (64, 64, 64)}}, r"must be \(out, in\)"),
        ({"shapes": {"attn.q": (64, 64.0)}}, "in whole numbers"),
        ({"shapes": {"attn.q": ("a", 64)}}, "in whole numbers"),
        ({"shapes": {3: (64, 64)}}, r"shapes\[3\]"),
        ({"shapes": {"experts.up": (64, 64)}}, r"must be \(out, in, experts\)"),
        ({"overrides": {"attn.q": (64, 64)}}, r"a key must be \(layer, role\)"),
        ({"overrides": {(0, "attn.q"): 64}}, r"overrides\[\(0, 'attn.q'\)\]=64"),
    ],
)
def test_what_is_no_shape_is_named_in_one_line(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpaceError, match=problem) as caught:
        Topology(**{"n_layers": 2, "shapes": SHAPES, **given})
    assert len(str(caught.value).splitlines()) == 1


def test_lists_and_numbers_of_numpy_are_shapes() -> None:
    sizes: Any = [np.int64(64), 64]
    topology = Topology(2, {"attn.q": sizes}, {(1, "attn.q"): None, (0, "attn.q"): sizes})
    assert topology.shapes["attn.q"] == topology.shape(0, "attn.q") == (64, 64)
    assert topology.shape(1, "attn.q") is None
