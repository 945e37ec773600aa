"""Which zero-cost scores tell where an adapter pays? Four settings, one LoRA at a site at a time.

    python examples/benchmarks/sensitivity.py --output autopeft/advice/measured.json

In each setting all scores of `autopeft advise` are computed on some training rows; then a small
LoRA is trained at each site alone, with two seeds. Printed are the rank correlations of scores and
gains with their intervals. The file is what `autopeft advise` shows beside the scores of a user's
model. `--settings reviews` measures one setting and keeps the file's others; `--rates` tries
learning rates on a few sites instead.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from autopeft import methods
from autopeft.advice.measure import linear_sites, measure_sites
from autopeft.advice.measured import Measured, MeasuredSite, Setting, worths
from autopeft.engine.executor import Executor
from autopeft.engine.messages import Job, RungMessage
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.preparing.prepare import prepare
from autopeft.preparing.prepared import PreparedSearch
from autopeft.settings import SearchSettings
from autopeft.utils.serialize import from_plain, strict_json
from autopeft.utils.versions import versions

_CACHE = "~/.cache/autopeft"
_COMMON = {"max_test_rows": 50, "rungs": 1, "workers": 1, "seed": 0}
_RANK = 4
_HEAD_RATE = 1e-2

SETTINGS: dict[str, dict[str, Any]] = {
    "reviews": {
        "title": "MiniLM, movie reviews",
        "rate": 1e-2,
        "model": f"{_CACHE}/all-MiniLM-L6-v2",
        "data": f"{_CACHE}/movie_snippets.csv",
        "max_train_rows": 2000,
        "max_validation_rows": 400,
        "max_length": 64,
        "steps": 50,
    },
    "entities": {
        "title": "MiniLM, entities in posts",
        "rate": 1e-2,
        "model": f"{_CACHE}/all-MiniLM-L6-v2",
        "data": f"{_CACHE}/ner.conll",
        "max_train_rows": 2000,
        "max_validation_rows": 300,
        "max_length": 64,
        "steps": 50,
    },
    "digits": {
        "title": "tiny ViT, digits",
        "rate": 1e-2,
        "model": f"{_CACHE}/tiny-vit",
        "data": f"{_CACHE}/digits",
        "max_validation_rows": 500,
        "steps": 100,
    },
    "answers": {
        "title": "SmolLM2-135M, answers on reviews",
        "rate": 5e-3,
        "layers": (3, 11, 19, 27),
        "roles": ("attn.v", "attn.o", "mlp.up", "mlp.down"),
        "model": f"{_CACHE}/SmolLM2-135M-Instruct",
        "data": f"{_CACHE}/movie_sft.csv",
        "max_train_rows": 40,
        "max_validation_rows": 32,
        "max_length": 32,
        "batch_size": 4,
        "steps": 10,
    },
}
"""Name -> settings of a search; title, rate of the LoRAs, and which sites, if not all."""


def main() -> None:
    """Measures, prints, writes."""
    options = _options()
    torch.set_num_threads(1)
    names = options.settings.split(",")
    if options.rates:
        for name in names:
            _print_rates(name)
        return
    target = Path(options.output) if options.output else None
    found: dict[str, Setting] = {}
    if target is not None and target.exists():
        found |= from_plain(Measured, json.loads(target.read_text())).settings
    for name in names:
        found[name] = _measure(name, range(options.seeds))
    measured = Measured(
        command="python examples/benchmarks/sensitivity.py --output autopeft/advice/measured.json",
        date=datetime.date.today().isoformat(),
        versions={k: v for k, v in versions().items() if k in ("torch", "transformers", "peft")},
        rank=_RANK,
        settings={name: found[name] for name in SETTINGS if name in found},
    )
    if target is not None:
        target.write_text(_compact(measured))
    Console(width=130).print(_table(measured))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--settings", default=",".join(SETTINGS), help="names, comma-separated")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rates", action="store_true", help="try learning rates on a few sites")
    parser.add_argument("--output", default="", help="JSON file to write")
    return parser.parse_args()


def _ready(name: str) -> PreparedSearch:
    own = ("title", "rate", "layers", "roles")
    asked = {key: value for key, value in SETTINGS[name].items() if key not in own}
    asked |= {key: os.path.expanduser(asked[key]) for key in ("model", "data")}
    return prepare(SearchSettings.from_mapping({**_COMMON, **asked}))


def _sites(name: str, ready: PreparedSearch) -> list[tuple[int, str]]:
    own = SETTINGS[name]
    return [
        (layer, role)
        for layer, role in linear_sites(ready.space)
        if layer in own.get("layers", (layer,)) and role in own.get("roles", (role,))
    ]


def _measure(name: str, seeds: Sequence[int]) -> Setting:
    ready, own = _ready(name), SETTINGS[name]
    executor = Executor(ready.context())
    sites = _sites(name, ready)
    scored = measure_sites(executor, sites, rank=_RANK, n_rows=64, seed=0)
    assert not (scored.unreached + scored.broken), "every site is to be compared"
    plans = [AdapterPlan(), *(AdapterPlan([LayerSpec(*site, "lora", _RANK)]) for site in sites)]
    losses = [tuple(_losses(executor, ready, plan, own["rate"], seeds)) for plan in plans]
    return Setting(
        title=own["title"],
        learning_rate=own["rate"],
        steps=own["steps"],
        references=losses[0],
        sites=tuple(
            MeasuredSite(
                *site, loss, {k: float(f"{v:.5g}") for k, v in scored.values[site].items()}
            )
            for site, loss in zip(sites, losses[1:], strict=True)
        ),
    )


def _losses(
    executor: Executor, ready: PreparedSearch, plan: AdapterPlan, rate: float, seeds: Sequence[int]
) -> Iterator[float]:
    """Yield the validation loss after training a plan, for each seed."""
    settings = ready.settings
    assert settings.steps is not None
    train = TrainSettings(
        rate,
        method_rates=((methods.HEAD, _HEAD_RATE),) if ready.prices.topology.head_params else (),
        steps=settings.steps,
        batch_size=settings.rows_per_step,
    )
    candidate = Candidate(plan, train)
    for seed in seeds:
        executor.begin([Job("search", candidate, ready.prices.price(candidate), seed)])
        message = executor.advance()[0]
        assert isinstance(message, RungMessage), message
        yield float(f"{message.report.loss:.6g}")


def _print_rates(name: str) -> None:
    """Print the mean loss of a few sites at several learning rates."""
    ready = _ready(name)
    executor = Executor(ready.context())
    sites = _sites(name, ready)
    tried = sites[:: max(1, len(sites) // 4)]
    for rate in (2e-3, 5e-3, 1e-2, 2e-2):
        plans = [AdapterPlan([LayerSpec(*site, "lora", _RANK)]) for site in tried]
        losses = [loss for p in plans for loss in _losses(executor, ready, p, rate, [0])]
        print(f"{name} rate {rate:g}: {np.mean(losses):.4f}", np.round(losses, 4).tolist())


def _compact(measured: Measured) -> str:
    """Return JSON with a line for each site."""
    frame = strict_json(
        replace(measured, settings={k: replace(s, sites=()) for k, s in measured.settings.items()}),
        indent=1,
    )
    for setting in measured.settings.values():
        lines = ",\n".join(f"    {strict_json(s, indent=None).strip()}" for s in setting.sites)
        frame = frame.replace('"sites": []', f'"sites": [\n{lines}\n   ]', 1)
    return frame


def _table(measured: Measured) -> Table:
    table = Table("score", *(s.title for s in measured.settings.values()), "mean", "beyond depth")
    for name, worth in worths(measured).items():
        cells = [*worth.settings.values(), worth.mean, worth.beyond_depth]
        table.add_row(name, *map(str, cells))
    table.add_section()
    table.add_row("seeds", *(f"{s.agreement():+.2f}" for s in measured.settings.values()))
    return table


if __name__ == "__main__":
    main()
