"""Scores trainings on rows of other tasks: on text to retain, and on further tasks."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from autopeft.tasks.base import Evaluation
from autopeft.tasks.data import SPLITS, SecondTask, SplitName
from autopeft.tasks.registry import named_task
from autopeft.training.batching import rung_sample
from autopeft.training.evaluation import evaluate, with_base_model
from autopeft.training.precision import Precision
from autopeft.training.setup import TrainingSetup
from autopeft.training.trainer import Trainer


@dataclass(frozen=True)
class SecondScore:
    """The score on the rows of one other task, with adapters attached.

    Attributes:
        second: What is scored.
        setup: Scores it, in the precision in which users run an adapter.
        base: What is subtracted: the score of the bare base model, or 0.
    """

    second: SecondTask
    setup: TrainingSetup
    base: float = 0.0

    @classmethod
    def of(
        cls, second: SecondTask, model: torch.nn.Module, device: str, precision: Precision
    ) -> SecondScore:
        """Make ready to score, and score the bare base model once where it is subtracted."""
        task = named_task(second.settings).bound(second.data)
        if second.metric != "loss" and task.needs_text():
            settings = second.settings
            task.processor = task.load_processor(settings.model, settings.model_revision)
        data = with_base_model(model, task, second.data, device, dict.fromkeys(SPLITS, precision))
        # No accelerations: they are made for the rows of the search.
        made = cls(second, TrainingSetup(task, data, device, precision))
        if not second.is_over_base:
            return made
        found = evaluate(model, made.setup, second.split("test"), with_text=made.has_text)
        return replace(made, base=made.value(found))

    @property
    def has_text(self) -> bool:
        """Whether text is generated."""
        return self.second.metric != "loss" and self.setup.task.needs_text()

    def value(self, found: Evaluation) -> float:
        """Return the score that an evaluation tells, that of the base subtracted."""
        metric = self.second.metric
        return (found.loss if metric == "loss" else found.metrics[metric]) - self.base

    def measure(self, training: Trainer, split: SplitName, n_rows: int | None = None) -> float:
        """Return the score of a training as it is now.

        Args:
            training: Its time is booked as evaluation.
            split: Split of the search's own rows that is scored at the same time.
            n_rows: Rows that are scored at most, the same in every training; None: all. All are
                where the base's score is subtracted, which is of all of them.
        """
        name = self.second.split(split)
        n_most = None if self.second.is_over_base else n_rows
        rows = rung_sample(len(self.setup.data.splits[name]), n_most)
        return self.value(training.score(self.setup, name, rows=rows, with_text=self.has_text))


def measure_all(
    scores: Iterable[SecondScore], training: Trainer, split: SplitName, n_rows: int | None = None
) -> dict[str, float]:
    """Return each score by the name of its quality, and how long they took.

    The seconds are "retain_seconds" of what is scored over the base, and "also_seconds".
    """
    measured: dict[str, float] = {}
    for score in scores:
        started = time.perf_counter()
        measured[score.second.name] = score.measure(training, split, n_rows)
        name = "retain_seconds" if score.second.is_over_base else "also_seconds"
        measured[name] = measured.get(name, 0.0) + time.perf_counter() - started
    return measured
