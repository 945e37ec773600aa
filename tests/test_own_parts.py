"""A search whose task, method and cost are the user's own and have no name to import them by."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from covering import usual_first
from restored import restored

import autopeft
from autopeft import methods
from autopeft.costs.objectives import COSTS
from autopeft.errors import SettingsError
from autopeft.methods.registry import METHODS
from autopeft.tasks.registry import TASKS
from autopeft.tasks.text_classification import TextClassification

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    with restored(COSTS, METHODS, TASKS):
        yield


@pytest.mark.parametrize("backend", usual_first(["local", "ray"], "ray"))
def test_a_search_of_own_parts(
    backend: str, tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sentiment(TextClassification):
        name = "sentiment"
        description = "a sentiment for each text"

    rate = 2.0
    autopeft.register_method(replace(methods.get("lora"), name="own_lora", default_ranks=(1, 2)))
    autopeft.register_cost("rent", lambda price, plan: rate * len(plan.specs))
    # Workers of Ray have a working folder of their own.
    monkeypatch.chdir(tiny_model.parent)
    result = autopeft.search(
        model=tiny_model.name,
        data=os.path.relpath(tiny_data),
        output=str(tmp_path / "run"),
        task=Sentiment(),
        space={"methods": ["own_lora"]},
        objectives=["rent", "trainable_params"],
        constraints=["rent<=12"],
        budget="8trials",
        steps=30,
        metric="loss",
        batch_size=8,
        max_length=16,
        confirm_seeds=1,
        max_finalists=2,
        backend=backend,
        workers=1,
    )
    with pytest.raises(SettingsError, match="pick='rent<=3': rent is no cost of this search"):
        autopeft.price(
            model=str(tiny_model), data=str(tiny_data), max_length=16, steps=4, pick="rent<=3"
        )
    front = json.loads((result.folder / "front.json").read_text())
    assert front["task"] == "sentiment"
    assert [o["name"] for o in front["objectives"]] == ["loss", "rent", "trainable_params"]
    # LoRAs cut to lower ranks are priced by the worker.
    assert not any("confirming" in warning for warning in front["warnings"])
    monkeypatch.chdir(tmp_path)
    assert autopeft.load_adapter(str(tiny_model), result.front[0].folder)
    assert any(member.objectives["rent"] > 0 for member in result.front)
    for member in result.front:
        assert member.objectives["rent"] == 2.0 * len(member.candidate.plan.specs) <= 12
        assert set(member.candidate.plan.methods) <= {"own_lora", "lora"}
    for row in front["front"]:
        assert row["price"]["others"] == {"rent": row["objectives"]["rent"]}
    monkeypatch.chdir(tiny_model.parent)
    assert autopeft.report(result.folder).front == result.front
    del COSTS._items["rent"]
    quality, rent, _ = autopeft.SearchResult.read(result.folder).view.objectives
    assert (quality.is_known, rent.is_known) == (False, True)
