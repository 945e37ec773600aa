"""Scores of adapters on other rows: what they make the base model forget, and further tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from autopeft.comparing.judging import Scored
from autopeft.confirm.comparison import compare
from autopeft.confirm.finalists import SeedScore
from autopeft.confirm.intervals import Interval, quality_interval
from autopeft.costs.objectives import Objective
from autopeft.errors import AdapterError
from autopeft.tasks.base import Evaluation
from autopeft.tasks.data import IGNORED, EncodedSplit, TaskData
from autopeft.training.evaluation import evaluate
from autopeft.training.precision import Precision
from autopeft.training.second_scores import SecondScore

N_DRAWS = 1000
"""Resamples of the rows."""

_SAME = 1e-3
"""Relative difference between a mean loss and that of its rows above which rows tell nothing."""


@dataclass(frozen=True)
class FurtherValue:
    """A further quality of one adapter.

    Attributes:
        value: What it is; over the base, if that is subtracted.
        interval: Its 95 % interval over the rows; None where the rows do not tell it. What is over
            the base is paired with it, row by row, and holds for all adapters at once.
    """

    value: float
    interval: Interval | None


class FurtherScores:
    """Scores models on other rows, the bare base model first.

    Args:
        data: The data of the comparison; its `second` say what is scored.
        base: The bare base model.
        name: Its name.
        device: Device of the models.
        precision: Precision of the computation.
        seed: Of the resamples, which all models share.
    """

    def __init__(
        self,
        data: TaskData,
        base: nn.Module,
        name: str,
        *,
        device: str,
        precision: Precision,
        seed: int = 0,
    ) -> None:
        # Both values of a difference are kept: the base is one of the models.
        self._scores = [
            SecondScore.of(replace(each, is_over_base=False), base, device, precision)
            for each in data.second
        ]
        self._is_over_base = [each.is_over_base for each in data.second]
        self._base, self._seed = name, seed
        self._found: list[dict[str, Scored]] = [{} for _ in self._scores]

    def add(self, name: str, model: nn.Module) -> None:
        """Score a model with its adapter."""
        for score, found in zip(self._scores, self._found, strict=True):
            split = score.second.split("test")
            is_loss = score.second.metric == "loss"  # Its draws are made here.
            n_draws = 0 if is_loss else N_DRAWS
            told = evaluate(model, score.setup, split, with_text=score.has_text, n_draws=n_draws)
            rows, is_decoder = score.setup.data.splits[split], score.setup.task.is_autoregressive
            draws = told.draws
            if is_loss:
                draws = loss_draws(told, row_weights(rows, is_decoder=is_decoder), self._seed)
            made = SeedScore(
                seed=0,
                validation={},
                test={score.second.name: score.value(told)},
                test_rows=tuple(map(float, told.rows)),
                objectives={},
                test_draws=() if draws is None else tuple(map(float, draws)),
            )
            check_finite(name, score.second.name, made.test[score.second.name])
            found[name] = Scored(name, (made,), name != self._base)

    def values(self) -> dict[str, dict[str, FurtherValue]]:
        """Return the further qualities of each model, by its name and theirs."""
        result: dict[str, dict[str, FurtherValue]] = {name: {} for name in self._names()}
        for score, found, is_over in zip(
            self._scores, self._found, self._is_over_base, strict=True
        ):
            quality = score.second.quality
            told = self._over_base(found, quality) if is_over else _alone(found, quality)
            for name, value in told.items():
                result[name][quality.name] = value
        return result

    def _names(self) -> Sequence[str]:
        return list(self._found[0]) if self._found else []

    def _over_base(
        self, found: Mapping[str, Scored], quality: Objective
    ) -> dict[str, FurtherValue]:
        """Return what each model has over the base, paired with it by rows."""
        base = found[self._base]
        others = [scored for name, scored in found.items() if name != self._base]
        has_draws = all(scored.seeds[0].test_draws for scored in found.values())
        gains = compare([(each, base) for each in others], quality, self._seed) if others else []
        values = {self._base: FurtherValue(0.0, None)}
        for scored, gain in zip(others, gains, strict=True):
            # A gain is such that more is better.
            sign = quality.sign()
            low, high = sorted((sign * gain.low + 0.0, sign * gain.high + 0.0))  # No minus zero.
            value = scored.seeds[0].test[quality.name] - base.seeds[0].test[quality.name]
            values[scored.digest] = FurtherValue(value, (low, high) if has_draws else None)
        return values


def check_finite(name: str, metric: str, score: float) -> None:
    """Check what one model scored: one that is no number would take all intervals with it.

    Raises:
        AdapterError: naming the model and the metric.
    """
    if not math.isfinite(score):
        problem = f"has a {metric} of {score}"
        raise AdapterError("adapter", name, problem, "leave it out, or train it again")


def _alone(found: Mapping[str, Scored], quality: Objective) -> dict[str, FurtherValue]:
    """Return the quality of each model, with an interval of its own."""
    return {
        name: FurtherValue(scored.seeds[0].test[quality.name], quality_interval(scored, quality))
        for name, scored in found.items()
    }


def row_weights(rows: EncodedSplit, *, is_decoder: bool) -> NDArray[np.float64]:
    """Return how many terms of the loss each row has, shape (n_rows,): learned tokens, or 1."""
    labels = rows.token_arrays.get("labels")
    if labels is None:
        return np.ones(len(rows))
    is_learned = labels != IGNORED
    if is_decoder:
        is_learned = is_learned.copy()
        is_learned[rows.offsets[:-1]] = False  # Nothing predicts the first token.
    before = np.append(0, np.cumsum(is_learned))[rows.offsets[:: rows.sequences_per_row]]
    weights: NDArray[np.float64] = np.diff(before).astype(float)
    return weights


def loss_draws(
    found: Evaluation, weights: NDArray[np.float64], seed: int
) -> NDArray[np.float64] | None:
    """Return minus the loss on resamples of the rows, shape (N_DRAWS,); None if they do not tell.

    The Bayesian bootstrap (Rubin, Annals of Statistics 9, 1981). Models that are scored on the same
    rows share the resamples, so that draws of one position are paired.

    Args:
        found: Its `rows` are minus the mean loss of each row.
        weights: Terms of each row, shape (n_rows,).
        seed: Of the resamples.
    """
    whole = float(found.rows @ weights / max(weights.sum(), 1.0))
    if len(found.rows) < 2 or abs(whole + found.loss) > _SAME * max(1.0, abs(found.loss)):
        return None
    drawn = np.random.default_rng(seed).standard_exponential((N_DRAWS, len(weights))) * weights
    draws: NDArray[np.float64] = drawn @ found.rows / drawn.sum(axis=1)
    return draws
