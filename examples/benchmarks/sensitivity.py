"""Does one backward pass predict where adapters are worth their cost? MiniLM on movie snippets.

    python examples/benchmarks/sensitivity.py --output sensitivity.json

One pass over some training rows gives the gradient of every frozen weight; small LoRAs are then
trained at one layer's attention or feed-forward at a time. It prints the rank correlation of each
measure of sensitivity with the gain of these LoRAs, and that of depth, which costs nothing.
The search would only gain from a measure that predicts better than depth does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from autopeft import methods
from autopeft.engine.executor import Executor
from autopeft.engine.messages import Job, RungMessage
from autopeft.models.attach import attach
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.prepare import PreparedSearch, prepare
from autopeft.settings import SearchSettings
from autopeft.tasks.batch import collate

_SETTINGS = {
    "model": "~/.cache/autopeft/all-MiniLM-L6-v2",
    "data": "~/.cache/autopeft/movie_snippets.csv",
    "max_train_rows": 2000,
    "max_validation_rows": 500,
    "max_test_rows": 50,
    "max_length": 64,
    "steps": 75,
    "rungs": 1,
}
_PLACES = {"attention": ("attn.q", "attn.v"), "feed-forward": ("mlp.up", "mlp.down")}
_RATE_POSITION = 0.75
"""In LoRA's range: what the sweep of `learning_rates.py` found best here."""

_EXECUTOR: Executor | None = None
_READY: PreparedSearch | None = None


@dataclass(frozen=True)
class Trial:
    """A LoRA at one place of one layer."""

    layer: int
    place: str
    rank: int
    seed: int


def main() -> None:
    """Measures, trains, prints, writes."""
    options = _options()
    ready = prepare(SearchSettings.from_mapping(_SETTINGS))
    n_layers = ready.prices.topology.n_layers
    trials = [
        Trial(layer, place, options.rank, seed)
        for seed in range(options.seeds)
        for layer in range(n_layers)
        for place in _PLACES
    ]
    measured = _sensitivities(ready)
    with multiprocessing.get_context("spawn").Pool(
        options.workers, initializer=_load, initargs=(ready,)
    ) as pool:
        losses = pool.map(_run, trials, chunksize=1)
    rows = []
    for layer in range(n_layers):
        for place in _PLACES:
            own = [
                loss
                for trial, loss in zip(trials, losses, strict=True)
                if (trial.layer, trial.place) == (layer, place)
            ]
            rows.append(
                {
                    "layer": layer,
                    "place": place,
                    "loss": float(np.mean(own)),
                    "seeds": own,
                    "depth": layer,
                    **measured[layer, place],
                }
            )
    names = ("depth", "gradient", "weight x gradient", "gradient a number")
    found = {
        name: float(spearmanr([r[name] for r in rows], [-r["loss"] for r in rows]).statistic)
        for name in names
    }
    if options.output:
        Path(options.output).write_text(json.dumps({"rows": rows, "correlation": found}, indent=1))
    table = Table("layer", "place", "loss", *names[1:])
    for row in rows:
        cells = (f"{row[name]:.3g}" for name in names[1:])
        table.add_row(str(row["layer"]), row["place"], f"{row['loss']:.4f}", *cells)
    table.add_section()
    table.add_row("", "rank correlation", "", *(f"{found[name]:+.2f}" for name in names[1:]))
    Console().print(table)
    Console().print(f"rank correlation of depth: {found['depth']:+.2f}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", default="", help="JSON file to write")
    return parser.parse_args()


def _sensitivities(
    ready: PreparedSearch, n_rows: int = 128
) -> dict[tuple[int, str], dict[str, float]]:
    """Norms over the weights of each place, from one backward pass in fp32."""
    executor = Executor(ready.context())
    backbone, task = executor.backbone, executor.setup.task
    empty = Candidate(AdapterPlan(), TrainSettings(1e-3, steps=1))
    with attach(backbone, empty, seed=0) as attached:
        weights = {
            (layer, place): [
                attached.model.get_submodule(path).weight
                for role in roles
                for path in backbone.layout.modules[layer, role]
            ]
            for layer in range(ready.prices.topology.n_layers)
            for place, roles in _PLACES.items()
        }
        for group in weights.values():
            for weight in group:
                weight.requires_grad_(True)
        rows = np.arange(min(n_rows, len(ready.data.train)), dtype=np.int64)
        task.loss(attached.model, collate(ready.data, "train", rows)).backward()  # type: ignore[no-untyped-call]
        return {place: _norms(group) for place, group in weights.items()}


def _norms(weights: list[Any]) -> dict[str, float]:
    squares = sum(float(w.grad.square().sum()) for w in weights)
    return {
        "gradient": squares**0.5,
        "weight x gradient": sum(float((w.detach() * w.grad).abs().sum()) for w in weights),
        "gradient a number": (squares / sum(w.numel() for w in weights)) ** 0.5,
    }


def _load(ready: PreparedSearch) -> None:
    global _EXECUTOR, _READY
    torch.set_num_threads(1)
    _EXECUTOR, _READY = Executor(ready.context()), ready


def _run(trial: Trial) -> float:
    assert _EXECUTOR is not None
    assert _READY is not None
    low, high = methods.learning_rate_range("lora")
    rate = float(f"{low * (high / low) ** _RATE_POSITION:.3g}")
    specs = (LayerSpec(trial.layer, role, "lora", trial.rank) for role in _PLACES[trial.place])
    train = TrainSettings(rate, method_rates=((methods.HEAD, 1e-2),), steps=_READY.settings.steps)
    candidate = Candidate(AdapterPlan(specs), train)
    _EXECUTOR.begin([Job("search", candidate, _READY.prices.price(candidate), trial.seed)])
    message = _EXECUTOR.advance()[0]
    assert isinstance(message, RungMessage), message
    return message.report.loss


if __name__ == "__main__":
    main()
