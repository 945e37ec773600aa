"""Checks that a search fits in the memory of its devices, and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from autopeft.costs import PriceTable
from autopeft.costs.constraints import Constraint
from autopeft.errors import ModelError
from autopeft.models.quantization import NONE
from autopeft.preparing.notes import Note
from autopeft.preparing.pricing import load_of, meta_of
from autopeft.preparing.trained import Trained
from autopeft.profiling.fits import Fitting
from autopeft.searcher.space.space import SearchSpace
from autopeft.settings import SearchSettings
from autopeft.tasks.data import TaskData
from autopeft.utils.formatting import human_bytes


def check_fits(
    prices: PriceTable,
    space: SearchSpace,
    room: float,
    settings: SearchSettings,
    found: Trained,
    note: Note,
    holding: Callable[[float], int | None],
) -> tuple[Constraint, ...]:
    """Check that a model fits, before it is loaded; return the limit that memory sets, if any.

    `holding` says how many devices of a worker hold so many bytes.

    Raises:
        ModelError: if the cheapest candidate does not fit.
    """
    candidates = space.baselines() or (space.reference(), *space.portfolio())
    cheapest = min(candidates, key=lambda c: prices.price(c).peak_memory_bytes)
    needed = prices.price(cheapest).peak_memory_bytes
    if needed > room:
        problem = f"the cheapest training needs {human_bytes(needed)}, {human_bytes(room)} are free"
        remedy = "use a smaller batch_size or max_length"
        if found.data is not None and found.task is not None:
            meta = meta_of(replace(settings, quantization=NONE), found.data, found.task)
            load = load_of(settings, found.data, found.task)
            dtype = "bfloat16" if prices.float_bytes == 2 else "float32"
            fitting = Fitting(meta, load, device="cpu", dtype=dtype)
            remedy = fitting.remedy(room, cheapest.plan)
        if (count := holding(needed)) is not None:
            remedy += f"; or use gpus_per_worker={count}"
        raise ModelError("model", settings.model, problem, remedy)
    rng = np.random.default_rng(0)
    draws = [*candidates, *space.portfolio(), *(space.sample_stratified(rng) for _ in range(64))]
    if max(prices.price(c).peak_memory_bytes for c in draws) <= room / 2:
        return ()  # No candidate comes near.
    note(f"candidates that need more than {human_bytes(room)} of memory are not trained")
    return (Constraint("peak_memory_bytes", room, f"peak_memory_bytes<={human_bytes(room)}"),)


def checkpointed(prices: PriceTable, space: SearchSpace, room: float, note: Note) -> PriceTable:
    """Return prices with gradient checkpointing if a LoRA of the first ones fits only so."""
    again = prices.with_checkpointing()
    for candidate in space.baselines():
        without, needed = (t.price(candidate).peak_memory_bytes for t in (prices, again))
        if needed <= room < without:
            note(
                f"gradient checkpointing is on: a LoRA needs {human_bytes(without)} without it and "
                f"{human_bytes(needed)} with it, {human_bytes(room)} are free"
            )
            return again
    return prices


def within(
    prices: PriceTable, space: SearchSpace, room: float | None, data: TaskData | None
) -> PriceTable:
    """Return prices with as large a batch to score as fits: scoring halves one that does not."""
    if room is None or data is None:
        return prices
    reference, least = space.reference(), int(data.validation.lengths.max())
    while prices.price(reference).peak_memory_bytes > room and prices.scoring_tokens > least:
        tokens = max(float(least), prices.scoring_tokens / 2)
        longer = {n: replace(table, scoring_tokens=tokens) for n, table in prices.longer.items()}
        prices = replace(prices, scoring_tokens=tokens, longer=longer)
    return prices
