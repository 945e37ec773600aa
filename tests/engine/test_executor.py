"""A worker lives as long as its search: what hundreds of trials leave behind adds up."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest
import torch
from tiny_models import assert_same_state, prompt_sizes_of, random_plan, state_of

from autopeft.engine.executor import Workbench
from autopeft.engine.messages import Job, RungMessage
from autopeft.plan import Candidate, TrainSettings
from autopeft.prepare import prepare
from autopeft.settings import SearchSettings
from autopeft.training import precision

_TRIALS = 160
_PLANS = 20


def _held() -> int:
    """Bytes of all tensors alive, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.filterwarnings("ignore")
def test_hundreds_of_trials_leave_nothing_behind(tiny_model: Path, tiny_data: Path) -> None:
    settings = {"steps": 2, "batch_size": 4, "max_length": 16, "precision": "bf16"}
    settings |= {"max_validation_rows": 8, "budget": "9trials"}
    bench = Workbench(
        prepare(
            SearchSettings.from_mapping(
                {"model": str(tiny_model), "data": str(tiny_data), **settings}
            )
        ).context()
    )
    before = state_of(bench.backbone)
    train = TrainSettings(1e-3, steps=2, batch_size=4)
    drawn = (random_plan(bench.backbone.topology, seed, 0.3) for seed in itertools.count())
    # Prompts of any size are not priced here.
    plans = list(itertools.islice((p for p in drawn if not prompt_sizes_of(p)), _PLANS))
    held = {}
    for trial in range(_TRIALS):
        bench.begin(Job("search", Candidate(plans[trial % _PLANS], train), seed=0))
        message = bench.advance()
        assert isinstance(message, RungMessage), message
        bench.clear()
        if (trial + 1) % _PLANS == 0:
            held[trial + 1] = _held()
    # All plans have been seen once by then, and all caches are full.
    assert held[_TRIALS] == held[2 * _PLANS], held
    assert len(precision._COPIES) < 100
    assert_same_state(before, state_of(bench.backbone))
