"""What scoring the test split in fp32 takes of a confirmation, and what bf16 would change.

    python examples/benchmarks/scoring.py

A LoRA of the quickstart is trained as a finalist is: 75 steps, then the validation split in the
training's precision and the test split in fp32. The last is done in bf16 too. Seconds are those of
this process's CPU time, from a filled activation cache on. Rows differ where the two precisions
answer differently; their losses show how far apart they are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from rank_axis import SETTINGS
from rich.console import Console
from rich.table import Table

from autopeft.engine.loaded_model import LoadedModel
from autopeft.models.attach import attach
from autopeft.plan import Candidate
from autopeft.preparing.prepare import prepare
from autopeft.settings import SearchSettings
from autopeft.tasks.data import SplitName
from autopeft.training.precision import Precision
from autopeft.training.trainer import Trainer


def main() -> None:
    """Trains, scores, prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plans", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ready = prepare(SearchSettings.from_mapping({**SETTINGS["snippets"], "precision": "bf16"}))
    base = LoadedModel(ready.context())
    table = Table("plan", "train", "validation", "test, fp32", "test, bf16", "share", "rows differ")
    for candidate in ready.space.baselines(options.plans):
        table.add_row(*_row(base, candidate))
    Console().print(table)


def _row(base: LoadedModel, candidate: Candidate) -> list[str]:
    steps = candidate.train.steps
    with attach(base.backbone, candidate, seed=1) as attached:
        setup = base.setup_above(candidate.plan.lowest_layer)
        trainer = Trainer(attached, setup, candidate.train, seed=1)
        train, _ = _timed(lambda: trainer.train_to(steps))
        ways: list[tuple[SplitName, Precision]] = [
            ("validation", "bf16"),
            ("test", "fp32"),
            ("test", "bf16"),
        ]
        found = []
        for split, precision in ways:
            score = partial(trainer.evaluate, split, precision=precision)
            score()  # The cache is filled.
            found.append(_timed(score))
    (validation, _), (exact, of_fp32), (rounded, of_bf16) = found
    whole = train + validation + exact
    n_differ = int((np.array(of_fp32.rows) != np.array(of_bf16.rows)).sum())
    specs = candidate.plan.specs
    name = f"{len(specs)} sites from block {candidate.plan.lowest_layer}, rank {specs[0].rank}"
    return [
        name,
        *(f"{seconds:.1f}" for seconds in (train, validation, exact, rounded)),
        f"{(exact - rounded) / whole:.0%} of {whole:.1f} s",
        f"{n_differ} of {len(of_fp32.rows)}, loss {of_bf16.loss - of_fp32.loss:+.5f}",
    ]


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    found = run()
    return time.process_time() - began, found


if __name__ == "__main__":
    main()
