from __future__ import annotations

from dataclasses import replace

from autopeft.costs import Topology
from autopeft.costs.objectives import objective
from autopeft.searcher.controller import SearchController
from autopeft.searcher.space.space import SearchSpace
from autopeft.session import _untried


def test_a_lora_that_the_searcher_found_is_tried_too() -> None:
    space = SearchSpace.from_source(
        {"methods": ["lora", "ia3"]}, Topology(4, {"attn.q": (64, 64), "attn.v": (64, 64)})
    )
    controller = SearchController(space, ["accuracy", "trainable_params"], pruner="none")
    for i in range(8):
        trial = controller.ask()
        assert trial is not None
        controller.tell(trial, score=0.7 + 0.01 * i)
    trials = controller.trials()
    loras = [trial for trial in trials if trial.origin == "baseline"]
    tuned = max(loras, key=lambda trial: trial.values["accuracy"])
    found = [
        replace(trial, origin="search", values={**trial.values, "accuracy": 0.95})
        if trial.number == tuned.number
        else trial
        for trial in trials
    ]
    doubt = _untried(space, objective("accuracy"), found, 0.01)
    assert doubt is not None
    assert doubt.n_baselines == len(loras)
    same = [replace(t, origin="baseline") if t.number == tuned.number else t for t in found]
    assert doubt == _untried(space, objective("accuracy"), same, 0.01)
