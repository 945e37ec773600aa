"""Score a member on the test split as another program loads it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autopeft.errors import DataError, SettingsError
from autopeft.models.export import Exported
from autopeft.preparing.paths import expand
from autopeft.preparing.task_data import load_task
from autopeft.reporting.converted import Converted, weights_of
from autopeft.result import Member
from autopeft.settings import SearchSettings
from autopeft.tasks.base import Evaluation
from autopeft.training.evaluation import evaluate
from autopeft.training.precision import Precision
from autopeft.training.setup import TrainingSetup


class ExportScorer:
    """Scores what an export wrote on the test rows of its search, as the confirmation does.

    Args:
        settings: Of the search.
        fingerprint: Of the data that it read.
        device: Where the model is, as torch names it.

    Raises:
        DataError: if the data are not those of the search.
        SettingsError: if a training function of the user's scored it.
    """

    def __init__(self, settings: SearchSettings, fingerprint: str, device: str) -> None:
        if settings.evaluate is not None:
            problem = f"{settings.evaluate} trains and scores by itself"
            raise SettingsError("score", True, problem, "leave it out, and score it there")
        data, self._task = load_task(expand(settings))
        if data.summary().fingerprint != fingerprint:
            problem = "is not what the search read, so scores could not be compared"
            raise DataError("data", settings.data, problem, "restore it, or leave --score out")
        # What was saved speaks in the unit of the data.
        self._data = replace(data, output_scale=None)
        self._device = device
        self._found: Evaluation | None = None

    def see_base(self, model: Any) -> None:
        """Take what the task needs of the base model: a preference's reference."""
        only_test = replace(self._data, splits={"test": self._data.test})
        found = self._task.on_base_model(model, only_test, self._device)
        self._data = replace(self._data, splits={**self._data.splits, **found.splits})

    def score(self, model: Any) -> None:
        """Score the model that was written."""
        first = next(p for p in model.parameters() if p.is_floating_point())
        precision: Precision = "bf16" if first.dtype.itemsize == 2 else "fp32"
        setup = TrainingSetup(self._task, self._data, self._device, precision)
        self._found = evaluate(model, setup, "test")
        self._dtype = str(first.dtype).removeprefix("torch.")

    def converted(self, member: Member, exported: Exported) -> Converted:
        """Return the scores beside the member's own."""
        assert self._found is not None, "it was scored before"
        assert member.folder is not None, "it was exported"
        own = member.entry.adapter_score
        is_test = own is not None and own.split == "test"
        return Converted(
            digest=member.digest,
            format=exported.format,
            server=exported.server,
            quantization=exported.quantization,
            rank=exported.rank,
            dtype=self._dtype,
            lossy=exported.is_lossy,
            metrics={**self._found.metrics, "loss": self._found.loss},
            member=dict(own.metrics) if own is not None and is_test else {},
            n_rows=own.n_rows if own is not None and is_test else len(self._data.test),
            weights=weights_of(member.folder),
            file_bytes=sum(f.stat().st_size for f in exported.folder.rglob("*") if f.is_file()),
        )
