"""Measures what training adapters makes a model forget."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from autopeft.settings import SearchSettings
from autopeft.tasks.retained import retained_task
from autopeft.training.evaluation import evaluate
from autopeft.training.precision import Precision
from autopeft.training.setup import TrainingSetup
from autopeft.training.trainer import Trainer


@dataclass(frozen=True)
class Retention:
    """The loss on what the model should retain, of the bare base and with adapters attached.

    Attributes:
        setup: Scores the retained rows, which are its test split, in the precision in which users
            run an adapter.
        base_loss: That of the model without adapters, in nats per predicted token, or per row of a
            task that predicts none.
    """

    setup: TrainingSetup
    base_loss: float

    @classmethod
    def of(
        cls,
        model: torch.nn.Module,
        setup: TrainingSetup,
        settings: SearchSettings,
        precision: Precision,
    ) -> Retention | None:
        """Score the bare base model, once; None if the data hold nothing to retain."""
        retained = setup.data.retained
        if retained is None:
            return None
        own = setup.task
        task = own if retained.task == own.name else retained_task(retained.task, settings)
        data = replace(setup.data, splits={"test": retained.rows})
        # No accelerations: they are made for the rows of the search.
        plain = TrainingSetup(task, data, setup.device, precision)
        return cls(plain, evaluate(model, plain, "test", with_text=False).loss)

    def measure(self, training: Trainer) -> dict[str, float]:
        """Return the `forgetting` of a training as it is now, and how long that took.

        It is the loss with the adapters attached minus that of the bare base: below 0 where the
        training helps. The seconds are booked as the training's evaluation.
        """
        started = time.perf_counter()
        loss = training.score(self.setup, "test", with_text=False).loss
        seconds = time.perf_counter() - started
        return {"forgetting": loss - self.base_loss, "retain_seconds": seconds}
