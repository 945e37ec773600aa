from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from autopeft.confirm.pruning_audit import Fidelity, fidelity
from autopeft.costs import Price
from autopeft.costs.objectives import objective
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.trial import TIME_UP, Trial
from autopeft.utils.serialize import from_plain, strict_json

OBJECTIVES = (objective("accuracy"), objective("trainable_params"))


def trial(
    number: int,
    quality: float,
    params: int,
    *,
    early: float,
    state: str = "complete",
    audit: int = 0,
) -> Trial:
    candidate = Candidate(
        AdapterPlan([LayerSpec(0, "attn.q", "lora", number + 1)]), TrainSettings(1e-3, steps=100)
    )
    is_complete = state == "complete"
    return Trial(
        number,
        candidate,
        Price(params, 4 * params, 1.0, 1, 0.0),
        "search",
        state,  # type: ignore[arg-type]
        {"accuracy": quality, "trainable_params": params} if is_complete else {},
        ((25, early), (100, quality)) if is_complete else ((25, early),),
        audited_at=audit,
    )


def test_correlation_saving_and_regret() -> None:
    trials = [
        trial(0, 0.6, 10, early=-0.9),
        trial(1, 0.7, 20, early=-0.8),
        trial(2, 0.8, 40, early=-0.7),
        trial(3, 0.75, 30, early=-1.0, audit=25),  # Looked worst at the rung, is on the front.
        trial(4, 0.5, 50, early=-0.95, audit=25),  # Rightly stopped.
        trial(5, math.nan, 60, early=-1.2, state="pruned"),
        replace(trial(6, math.nan, 60, early=-1.2, state="pruned"), reason=TIME_UP),
    ]
    found = fidelity(trials, OBJECTIVES)
    (rung,) = found.rungs
    assert (rung.step, rung.n_trials) == (25, 5)
    assert rung.correlation == pytest.approx(0.4)
    assert found.saved_share == pytest.approx(75 / 600)
    assert (found.n_pruned, found.n_audited, found.n_audited_on_front) == (1, 2, 1)
    assert found.regret == pytest.approx((0.05 + 0.0) / 2)
    assert "1 reached the front" in found.text()


def test_a_minimized_quality_is_turned_the_right_way() -> None:
    objectives = (objective("loss"), objective("trainable_params"))
    rows = [(0.9, 10, 0.95), (0.8, 20, 0.9), (0.7, 30, 0.8), (0.75, 40, 0.85)]
    trials = [
        Trial(
            i,
            Candidate(AdapterPlan(), TrainSettings(1e-3, steps=100)),
            Price(params, 4 * params, 1.0, 1, 0.0),
            "search",
            "complete",
            {"loss": loss, "trainable_params": params},
            ((25, early),),
            audited_at=25 if i == 2 else 0,
        )
        for i, (loss, params, early) in enumerate(rows)
    ]
    found = fidelity(trials, objectives)
    assert found.rungs[0].correlation == pytest.approx(1.0)
    assert found.regret == pytest.approx(0.1)


def test_what_pruning_lost_is_estimated_with_an_interval() -> None:
    trials = [
        trial(0, 0.6, 10, early=-0.9),
        trial(1, 0.9, 1000, early=-0.5),
        *(trial(2 + i, 0.5, 500, early=-1.0, audit=25) for i in range(3)),  # Rightly stopped.
        *(trial(5 + i, math.nan, 60, early=-1.2, state="pruned") for i in range(8)),
    ]
    right = fidelity(trials, OBJECTIVES)
    # None of three: that is no proof that none of eight would have.
    assert (right.lost_volume, right.lost_volume_interval) == (None, None)
    assert "hypervolume" not in right.text()
    assert right.front_share_interval == pytest.approx((0.0, 0.708), abs=1e-3)
    found = fidelity([*trials, trial(13, 0.8, 100, early=-1.0, audit=25)], OBJECTIVES)
    assert found.lost_volume is not None
    assert found.lost_volume_interval is not None
    low, high = found.lost_volume_interval
    assert 0.0 == low < found.lost_volume < high < 1.0
    assert "of the hypervolume" in found.text()
    few = fidelity(trials[:4], OBJECTIVES)
    assert (few.lost_volume, few.front_share_interval) == (None, None)


def test_nothing_is_claimed_of_few_trials() -> None:
    found = fidelity([trial(0, 0.6, 10, early=-0.9)], OBJECTIVES)
    assert found.rungs == ()
    assert (found.saved_share, found.n_audited) == (0.0, 0)
    assert found.regret is None
    assert fidelity([], OBJECTIVES).saved_share == 0.0


def test_it_survives_json() -> None:
    found = fidelity([trial(i, 0.6 + 0.01 * i, 10 + i, early=-i) for i in range(5)], OBJECTIVES)
    again = from_plain(Fidelity, json.loads(strict_json(found)))
    assert again == found
