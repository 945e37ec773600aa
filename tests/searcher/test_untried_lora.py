from __future__ import annotations

import math

from autopeft.costs import Topology
from autopeft.costs.objectives import objective
from autopeft.plan import Candidate
from autopeft.searcher.controller import SearchController
from autopeft.searcher.space.space import SearchSpace
from autopeft.searcher.untried_lora import chance_of_better_lora

SPACE = SearchSpace.from_source(
    {"methods": ["lora", "ia3"]}, Topology(4, {"attn.q": (64, 64), "attn.v": (64, 64)})
)
ACCURACY = objective("accuracy")


def quality(candidate: Candidate, best: float) -> float:
    """The learning rate alone matters; `best` is the logarithm of the best one."""
    return 0.8 - 0.1 * (math.log10(candidate.train.learning_rate) - best) ** 2


def chance(best: float, n_trials: int, margin: float = 0.01) -> float | None:
    controller = SearchController(SPACE, ["accuracy", "trainable_params"], pruner="none")
    for _ in range(n_trials):
        trial = controller.ask()
        assert trial is not None
        controller.tell(trial, score=quality(trial.candidate, best))
    return chance_of_better_lora(SPACE, ACCURACY, controller.trials(), margin)


def test_the_chance_of_a_better_lora_falls_as_lora_is_tuned() -> None:
    few, many = chance(-1.0, 8), chance(-1.0, 40)
    assert few is not None
    assert many is not None
    assert few > 0.5 > many
    assert chance(-1.0, 8, margin=2.0) == 0.0
    assert chance(-1.0, 2) is None
