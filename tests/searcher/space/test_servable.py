"""Spaces of plans that a server can load."""

from __future__ import annotations

import numpy as np
import pytest

from autopeft import methods
from autopeft.costs import Topology
from autopeft.errors import SettingsError, SpaceError
from autopeft.searcher.space.space import SearchSpace

_TOPOLOGY = Topology(4, {"attn.q": (64, 64), "attn.v": (64, 64), "norm": (64, 2)})


def _space(servable: str | None, **written: object) -> SearchSpace:
    return SearchSpace.from_source(written, _TOPOLOGY, servable=servable)


def test_what_cannot_be_served_is_never_drawn() -> None:
    space = _space("vllm", methods=["lora", "ia3", "oft", "ln_tuning", "rslora"])
    assert space.methods == ("lora", "rslora")
    assert space.left_out == ("ia3", "oft", "ln_tuning")
    rng = np.random.default_rng(0)
    drawn = {name for _ in range(50) for name in space.sample(rng).plan.methods}
    assert drawn == {"lora", "rslora"}


def test_a_rank_that_becomes_too_high_a_lora_is_left_out() -> None:
    topology = Topology(2, {"attn.q": (2048, 2048)})
    written = {"methods": {"loha": {"ranks": [4, 8, 16, 32]}}, "placements": {"q": ["attn.q"]}}
    ranks = {}
    for server in (None, "vllm", "sglang"):
        space = SearchSpace.from_source(written, topology, servable=server)
        ranks[server] = {option.rank for option in space.grid.options[1:]}
    # A LoHa of rank r is a LoRA of rank r * r: 512 is the highest in vLLM, and 128 by default.
    assert ranks == {None: {4, 8, 16, 32}, "vllm": {4, 8, 16}, "sglang": {4, 8}}


def test_a_merged_model_holds_all_that_can_be_merged() -> None:
    space = _space("mlx", methods=["lora", "ia3", "oft"])
    assert space.methods == ("lora", "ia3", "oft")
    assert all(methods.get(name).mergeable for name in space.methods)


def test_an_empty_space_is_one_line() -> None:
    with pytest.raises(SpaceError, match="none of the space's methods can be served: ia3, oft"):
        _space("vllm", methods=["ia3", "oft"])
    topology = Topology(2, {"attn.q": (2048, 2048)})
    with pytest.raises(SpaceError, match="can be served by vllm: the space is empty"):
        SearchSpace.from_source(
            {"methods": {"loha": {"ranks": [64]}}, "placements": {"q": ["attn.q"]}},
            topology,
            servable="vllm",
        )
    with pytest.raises(SettingsError, match="servable='vlm'"):
        _space("vlm", methods=["lora"])
