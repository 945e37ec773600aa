"""Compare adapters that were trained elsewhere: score each on one split, and judge the scores."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from autopeft.comparing.further import FurtherScores, FurtherValue, check_finite
from autopeft.comparing.judging import Judgement, Scored, judge
from autopeft.comparing.loading import Opened, Opener, base_summary
from autopeft.comparing.sources import BASE, Source, find_sources
from autopeft.confirm.finalists import SeedScore
from autopeft.confirm.intervals import Interval, quality_interval
from autopeft.costs import Price, PriceTable
from autopeft.costs.objectives import Objective
from autopeft.engine.job_execution import N_DRAWS
from autopeft.errors import AdapterError, AutoPeftError, DataError, SettingsError
from autopeft.models.loading import base_dtype
from autopeft.preparing.prepare import prepare
from autopeft.settings import SearchSettings
from autopeft.tasks.data import EncodedSplit, TaskData
from autopeft.training.evaluation import evaluate
from autopeft.training.precision import Precision
from autopeft.training.setup import TrainingSetup
from autopeft.utils.formatting import counted, one_line
from autopeft.utils.pareto import non_dominated

if TYPE_CHECKING:
    import pandas

UNTRAINED = "its new head is untrained, so it is compared with nothing"
"""Note of a base model that has no head for the task."""


@dataclass(frozen=True)
class Entry:
    """One adapter with its score and its costs.

    Attributes:
        name: What tells it from the others.
        folder: Where it is; "" for the base model.
        kind: "autopeft", "peft" or "model"; "base" for the base model.
        method: What it is, in one line.
        metrics: Every metric of the task on the scored rows, the loss included.
        quality: The one that is compared.
        interval: Its 95 % interval over the rows; None where it has none.
        trainable_params: Parameters that were trained; None where its files do not tell.
        file_bytes: Size of its tensors on disk.
        price: What training it costs, as `autopeft price` says; None where no plan says what it is.
        is_on_front: Whether no other is better and as small, and as good in each further quality.
        note: What a user should know of it; "" if nothing.
        further: Further qualities by name, such as "forgetting" (settings `retain`, `also`).
    """

    name: str
    folder: str
    kind: str
    method: str
    metrics: Mapping[str, float]
    quality: float
    interval: Interval | None
    trainable_params: int | None
    file_bytes: int
    price: Price | None = None
    is_on_front: bool = False
    note: str = ""
    further: Mapping[str, FurtherValue] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class AdapterComparison:
    """Adapters scored on the same rows, and what their scores show.

    Attributes:
        lines: What was read, and what to know of it.
        entries: The adapters and the base model, the best score first.
        objective: What they are compared by.
        n_rows: Rows that were scored.
        source: The file of the rows.
        judgement: Which of them differ.
        further: Further qualities that were scored.

    Example:
        >>> found = autopeft.compare(
        ...     ["runs/first"],
        ...     model="~/.cache/autopeft/all-MiniLM-L6-v2",
        ...     data="~/.cache/autopeft/movie_snippets.csv",
        ... )
        >>> [entry.kind for entry in found.entries if entry.kind != "base"]
        ['autopeft']
    """

    lines: tuple[str, ...]
    entries: tuple[Entry, ...]
    objective: Objective
    n_rows: int
    source: str
    judgement: Judgement
    further: tuple[Objective, ...] = ()

    def __repr__(self) -> str:
        return f"<AdapterComparison on {counted(self.n_rows, 'row')}: {self.judgement.headline}>"

    def entry(self, name: str) -> Entry:
        """Return the entry of that name.

        Raises:
            KeyError: if there is none.
        """
        for each in self.entries:
            if each.name == name:
                return each
        raise KeyError(name)

    def to_pandas(self) -> pandas.DataFrame:
        """Return one row for each entry, the best first, with its name as index."""
        import pandas

        rows = []
        for each in self.entries:
            low, high = each.interval or (math.nan, math.nan)
            peak = None if each.price is None else each.price.peak_memory_bytes
            further: dict[str, float] = {}
            for name, found in each.further.items():
                ends = found.interval or (math.nan, math.nan)
                further |= {name: found.value, f"{name}_low": ends[0], f"{name}_high": ends[1]}
            rows.append(
                {
                    "name": each.name,
                    self.objective.name: each.quality,
                    f"{self.objective.name}_low": low,
                    f"{self.objective.name}_high": high,
                    **further,
                    "trainable_params": each.trainable_params,
                    "file_bytes": each.file_bytes,
                    "peak_memory_bytes": peak,
                    "method": each.method,
                    "is_on_front": each.is_on_front,
                }
            )
        return pandas.DataFrame(rows).set_index("name")


def compare_adapters(
    paths: Sequence[str | Path],
    settings: SearchSettings,
    *,
    pick: str = "best",
    is_held_out: bool = False,
    takes_any_base: bool = False,
) -> AdapterComparison:
    """Score adapters on one split, and judge which of them differ.

    Args:
        paths: Folders of adapters, of models or of runs.
        settings: Model, data and task; what concerns the search plays no part.
        pick: Member of a run, or "all".
        is_held_out: Whether no adapter has seen any row of the data, so that all are scored.
        takes_any_base: Whether an adapter that names another base model is scored too.

    Raises:
        UserError: for a mistake in the settings, the data or a folder.
    """
    if settings.evaluate is not None:
        problem = "trains by itself, so autopeft cannot score what it trained"
        raise SettingsError("evaluate", settings.evaluate, problem, "leave it out, and name data")
    sources = find_sources(paths, pick, settings, is_held_out=is_held_out)
    lines: list[str] = []
    # Nothing is trained, so the machine is not measured.
    ready = prepare(replace(settings, workers=1), note=lines.append, must_fit=False)
    data, task = ready.data, ready.task
    assert data is not None, "there is no training function"
    assert task is not None, "there is no training function"
    # What is loaded speaks in the unit of the data.
    data = replace(_scored(data, settings, is_held_out=is_held_out), output_scale=None)
    bound = task.bound(data)
    opener = Opener(
        ready.settings,
        bound,
        data,
        ready.device,
        base_dtype(ready.device, ready.settings.precision),
        takes_any_base,
    )
    rows = data.test
    notes = [note for note in data.notes if note.startswith(("retain: ", "also "))]
    lines = [lines[0].splitlines()[0], *_said(rows, bound.labels, is_held_out=is_held_out), *notes]
    scores = _scores(sources, opener, ready.prices)
    is_base_ready = not scores[0][0].note
    arms = [Scored(entry.name, (score,), entry.name != BASE) for entry, score in scores]
    judgement = judge(
        arms if is_base_ready else arms[1:],
        bound.quality,
        base=BASE if is_base_ready else None,
        seed=settings.seed,
    )
    entries = sorted(
        (entry for entry, _ in scores), key=lambda e: -bound.quality.sign() * e.quality
    )
    further = tuple(second.quality for second in data.second)
    return AdapterComparison(
        tuple(lines),
        tuple(_with_front(entries, bound.quality, further)),
        bound.quality,
        len(rows),
        rows.source,
        judgement,
        further,
    )


def _scored(data: TaskData, settings: SearchSettings, *, is_held_out: bool) -> TaskData:
    """Return the data whose test split is what is scored."""
    if not is_held_out:
        return data
    for name in ("validation", "test"):
        if (value := getattr(settings, name)) is not None:
            problem = "is a split of its own, and --held-out scores all rows of --data"
            raise SettingsError(name, value, problem, "leave one of the two out")
    splits = list(data.splits.values())
    names = {name for split in splits for name in split.palettes}
    for name in names:
        palettes = [split.palettes.get(name, np.empty(0)) for split in splits]
        if not all(np.array_equal(each, palettes[0]) for each in palettes):
            problem = "its images cannot be scored as one split"
            raise DataError("data", splits[0].source, problem, "name them as --test instead")
    return replace(data, splits={**data.splits, "test": EncodedSplit.joined(splits)})


def _said(rows: EncodedSplit, labels: tuple[str, ...], *, is_held_out: bool) -> Iterator[str]:
    which = "all rows, which no adapter has seen" if is_held_out else "the test split"
    yield f"{counted(len(rows), 'row')} of {rows.source} scored: {which}"
    if not is_held_out:
        yield (
            "an adapter that was trained elsewhere may have been trained on some of them; "
            "--held-out says that it has seen none of the data"
        )
    if labels:
        yield f"outputs of a peft folder are read in this order: {', '.join(labels[:20])}"


def _scores(
    sources: Sequence[Source], opener: Opener, prices: PriceTable
) -> list[tuple[Entry, SeedScore]]:
    """Return the base model and each source with its score; one is loaded at a time."""
    backbone, task, data = opener.base(), opener.task, opener.data
    precision: Precision = "bf16" if opener.dtype == "bfloat16" else "fp32"
    only_test = replace(data, splits={"test": data.test})
    found = task.on_base_model(backbone.model, only_test, opener.device)
    data = replace(data, splits={**data.splits, **found.splits})
    setup = TrainingSetup(task, data, opener.device, precision)
    alone = Source(BASE, Path(), "model", UNTRAINED if backbone.head else "")
    opened = Opened(backbone.model, base_summary(backbone), 0)
    scores = [_scored_entry(alone, opened, setup, is_base=True)]
    further = FurtherScores(
        data,
        backbone.model,
        BASE,
        device=opener.device,
        precision=precision,
        seed=opener.settings.seed,
    )
    further.add(BASE, backbone.model)
    del backbone, opened
    for source in sources:
        gc.collect()  # A model holds circles, and two large ones may not fit.
        opened = opener.open(source)
        with _told_of(source):
            scores.append(_scored_entry(source, opened, setup, opener.priced(opened, prices)))
            further.add(source.name, opened.model)
        del opened
    values = further.values()
    return [(replace(e, further=values.get(e.name, {})), score) for e, score in scores]


@contextmanager
def _told_of(source: Source) -> Iterator[None]:
    """Name what cannot be scored; the base model could, on the same rows."""
    try:
        yield
    except AutoPeftError:
        raise
    except Exception as error:  # Adapters of others raise errors of many types.
        problem = f"cannot be scored ({one_line(error)})"
        remedy = "check that peft runs it on this model, or leave it out"
        raise AdapterError("adapter", str(source.folder), problem, remedy) from error


def _scored_entry(
    source: Source,
    opened: Opened,
    setup: TrainingSetup,
    price: Price | None = None,
    *,
    is_base: bool = False,
) -> tuple[Entry, SeedScore]:
    score, quality = _score(opened.model, setup), setup.task.quality
    for name in dict.fromkeys((quality.name, "loss")):
        check_finite(source.name if is_base else str(source.folder), name, score.test[name])
    entry = Entry(
        name=source.name,
        folder="" if is_base else str(source.folder),
        kind="base" if is_base else source.kind,
        method=opened.method,
        metrics=score.test,
        quality=score.test[quality.name],
        interval=quality_interval(Scored(source.name, (score,)), quality),
        trainable_params=opened.trainable_params,
        file_bytes=0 if is_base else source.n_bytes,
        price=price,
        note=source.note,
    )
    return entry, score


def _score(model: nn.Module, setup: TrainingSetup) -> SeedScore:
    """Score the test split as the confirmation does."""
    found = evaluate(model, setup, "test", n_draws=N_DRAWS)
    metrics = {**found.metrics, "loss": found.loss}
    return SeedScore(
        seed=0,
        validation={},
        test=metrics,
        test_rows=tuple(map(float, found.rows)),
        objectives={},
        test_draws=tuple(map(float, found.draws)) if found.draws is not None else (),
    )


def _with_front(
    entries: Sequence[Entry], quality: Objective, further: Sequence[Objective]
) -> list[Entry]:
    """Return the entries with those marked that are on the front of qualities and size."""
    size = size_name(entries)
    points = [
        [
            quality.sign() * e.quality,
            -float(getattr(e, size)),
            *(each.sign() * e.further[each.name].value for each in further),
        ]
        if e.note != UNTRAINED
        else [math.nan] * (2 + len(further))
        for e in entries
    ]
    keep = non_dominated(points)
    return [replace(e, is_on_front=bool(is_)) for e, is_ in zip(entries, keep, strict=True)]


def size_name(entries: Sequence[Entry]) -> str:
    """Return the attribute of entries by which the sizes of all can be compared."""
    has_all = all(entry.trainable_params is not None for entry in entries)
    return "trainable_params" if has_all else "file_bytes"
