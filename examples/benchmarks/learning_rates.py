"""Which learning rates suit each adapter method: a sweep on one model, one table, one JSON file.

    python examples/benchmarks/learning_rates.py --output rates.json

Each method sits on q and v of the upper half of the layers (or wherever else it can) at a middle
size, and is trained at rates spread evenly on a log scale around its present range. The ranges in
`autopeft/methods/` were set around the best of such a sweep; run it again on your own model to see
whether they hold there.

    python examples/benchmarks/learning_rates.py --methods lora --ranks 1,4,16,32 --powers 0,0.5,1

asks how the best rate moves with the rank where a low-rank update is scaled by 2 (8 / rank)^power:
0 is alpha = 2 rank, 0.5 rsLoRA's rule, 1 a constant alpha. Each best rate is the vertex of a
parabola through the losses around the best point; it prints the slope of its log over that of the
rank, with the spread over the ranks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from autopeft import methods
from autopeft.costs import Topology, is_legal
from autopeft.engine.executor import Executor
from autopeft.engine.messages import FailureMessage, Job, RungMessage
from autopeft.plan import MODEL, AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.preparing.prepare import prepare
from autopeft.preparing.prepared import PreparedSearch
from autopeft.settings import SearchSettings

_SETTINGS = {
    "model": "~/.cache/autopeft/all-MiniLM-L6-v2",
    "data": "~/.cache/autopeft/movie_snippets.csv",
    "max_train_rows": 2000,
    "max_validation_rows": 400,
    "max_test_rows": 50,
    "max_length": 64,
    "steps": 75,
    "rungs": 1,
    # Nothing is drawn from it, but prompts have a price only where the space has them.
    "space": {"methods": ["lora", "prompt_tuning"]},
}

_EQUAL_RANK = 8
"""The rank at which all rules of scaling agree."""

_EXECUTOR: Executor | None = None
_READY: PreparedSearch | None = None


@dataclass(frozen=True)
class Trial:
    """One method at one rate; `position` is 0 and 1 at the ends of the method's present range.

    `scaling` multiplies the low-rank update; `power` is the rule that gave it, if one is compared.
    """

    method: str
    rank: int
    position: float
    rate: float
    head_rate: float
    seed: int
    scaling: float = 2.0
    power: float | None = None


def main() -> None:
    """Sweeps, prints the table, writes the file."""
    options = _options()
    settings = SearchSettings.from_mapping(
        {**_SETTINGS, **{k: v for k, v in vars(options).items() if k in _SETTINGS and v}}
    )
    ready = prepare(settings)
    trials = list(_trials(ready.prices.topology, options))
    with multiprocessing.get_context("spawn").Pool(
        options.workers, initializer=_load, initargs=(ready,)
    ) as pool:
        done = [
            {**vars(trial), "loss": loss, "quality": quality}
            for trial, (loss, quality) in zip(trials, pool.imap(_run, trials), strict=True)
        ]
    result = {"settings": settings.to_mapping(), "trials": done, "best": _best(done)}
    table = _table(result["best"])
    if options.ranks:
        result["slopes"] = _slopes(done)
        table = _slope_table(result["slopes"])
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1))
    Console().print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--methods", default="", help="comma-separated; default: all")
    parser.add_argument("--points", type=int, default=6, help="rates a method")
    parser.add_argument("--margin", type=float, default=0.25, help="share beyond the range's ends")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ranks", default="", help="comma-separated; default: a middle size")
    parser.add_argument("--powers", default="0,0.5,1", help="with --ranks: rules to compare")
    parser.add_argument("--reach", type=float, default=5.0, help="with --ranks: times the centre")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", default="", help="JSON file to write")
    for name in ("model", "data"):
        parser.add_argument(f"--{name}", default="")
    for name in ("steps", "max_train_rows", "max_validation_rows", "max_length"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=0)
    return parser.parse_args()


def _trials(topology: Topology, options: argparse.Namespace) -> Iterator[Trial]:
    names = [n for n in options.methods.split(",") if n]
    if options.ranks:
        yield from _rank_trials(names, options)
        return
    low_head, high_head = methods.HEAD_RATES
    for method in methods.all_methods():
        if names and method.name not in names:
            continue
        low, high = method.learning_rate
        for position in np.linspace(-options.margin, 1 + options.margin, options.points):
            # The head's own rate stays in its range: it is the method's that is looked for.
            inside = min(max(float(position), 0.0), 1.0)
            for seed in range(options.seeds):
                yield Trial(
                    method.name,
                    _rank(topology, method),
                    round(float(position), 3),
                    float(f"{low * (high / low) ** position:.3g}"),
                    float(f"{low_head * (high_head / low_head) ** inside:.3g}"),
                    seed,
                )


def _rank_trials(names: list[str], options: argparse.Namespace) -> Iterator[Trial]:
    """Yield trials around the rate that would be best if it went as rank^(power - 0.8)."""
    low_head, high_head = methods.HEAD_RATES
    head = float(f"{(low_head * high_head) ** 0.5:.3g}")
    powers = [float(power) for power in options.powers.split(",")]
    for name, rank, power in itertools.product(names, _integers(options.ranks), powers):
        low, high = methods.learning_rate_range(name)
        center = (low * high) ** 0.5 * (rank / _EQUAL_RANK) ** (power - 0.8)
        for position in np.linspace(-1.0, 1.0, options.points):
            rate = float(f"{center * options.reach**position:.3g}")
            scaling = 2.0 * (_EQUAL_RANK / rank) ** power
            for seed in range(options.seeds):
                yield Trial(name, rank, float(position), rate, head, seed, scaling, power)


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _rank(topology: Topology, method: methods.Method) -> int:
    sizes = method.default_ranks[len(method.default_ranks) // 2 - 1 :] or (0,)
    role = _roles(method)[0]
    shape = topology.shape(0 if role == MODEL else topology.n_layers - 1, role)
    assert shape is not None
    return next((size for size in sizes if method.is_legal_rank(size, shape)), sizes[0])


def _roles(method: methods.Method) -> tuple[str, ...]:
    qv = tuple(role for role in ("attn.q", "attn.v") if role in method.roles)
    return qv or method.roles[:1]


def _load(ready: PreparedSearch) -> None:
    import torch

    global _EXECUTOR, _READY
    torch.set_num_threads(1)
    _EXECUTOR, _READY = Executor(ready.context()), ready


def _run(trial: Trial) -> tuple[float | None, float | None]:
    assert _EXECUTOR is not None
    assert _READY is not None
    topology = _READY.prices.topology
    method = methods.get(trial.method)
    n_layers = topology.n_layers
    specs = (
        LayerSpec(layer, role, trial.method, trial.rank)
        for role in _roles(method)
        for layer in ((0,) if role == MODEL else range(n_layers // 2, n_layers))
    )
    plan = AdapterPlan(s for s in specs if is_legal(topology, s))
    rates = ((trial.method, trial.rate), (methods.HEAD, trial.head_rate))
    train = TrainSettings(trial.rate, rates, alpha_ratio=trial.scaling, steps=_READY.settings.steps)
    candidate = Candidate(plan, train)
    _EXECUTOR.begin([Job("search", candidate, _READY.prices.price(candidate), trial.seed)])
    while True:
        message = _EXECUTOR.advance()[0]
        if isinstance(message, FailureMessage):
            return None, None
        assert isinstance(message, RungMessage)
        if message.is_last:
            return message.report.loss, message.report.metrics[_READY.objectives[0].name]


def _best(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each method the rate of lowest mean loss, and the range of rates nearly as good."""
    rows = []
    for name in dict.fromkeys(row["method"] for row in done):
        losses: dict[float, list[float]] = {}
        for row in done:
            if row["method"] == name:
                losses.setdefault(row["rate"], []).append(
                    float("inf") if row["loss"] is None else row["loss"]
                )
        means = {rate: sum(values) / len(values) for rate, values in losses.items()}
        best = min(means, key=lambda rate: means[rate])
        good = [rate for rate, loss in means.items() if loss <= means[best] * 1.02]
        low, high = methods.learning_rate_range(name)
        rows.append(
            {
                "method": name,
                "best": best,
                "loss": means[best],
                "good": [min(good), max(good)],
                "range": [low, high],
                "position": float(np.log(best / low) / np.log(high / low)),
            }
        )
    return rows


def _slopes(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each method and rule the best rates by rank, and what one common rate would cost."""
    rows = []
    for name, power in dict.fromkeys((row["method"], row["power"]) for row in done):
        mine = [r for r in done if (r["method"], r["power"]) == (name, power)]
        ranks = sorted({row["rank"] for row in mine})
        curves = {rank: _curve([r for r in mine if r["rank"] == rank]) for rank in ranks}
        best = {rank: _vertex(*curve) for rank, curve in curves.items()}
        slope, _ = np.polyfit(np.log(ranks), [np.log(best[rank]) for rank in ranks], 1)
        grid = np.linspace(
            max(curve[0][0] for curve in curves.values()),
            min(curve[0][-1] for curve in curves.values()),
            200,
        )
        loss = np.array([np.interp(grid, *curve) for curve in curves.values()])
        lost = loss - np.array([[min(curve[1])] for curve in curves.values()])
        rows.append(
            {
                "method": name,
                "power": power,
                "best": best,
                "loss": {rank: float(min(curve[1])) for rank, curve in curves.items()},
                "slope": float(slope),
                "spread": max(best.values()) / min(best.values()),
                "one_rate_costs": float(lost.mean(axis=0).min()) if grid[0] < grid[-1] else None,
            }
        )
    return rows


def _curve(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Return log rates, ascending, and the mean loss over seeds at each."""
    rates = sorted({row["rate"] for row in rows})
    losses = [
        float(np.mean([np.inf if r["loss"] is None else r["loss"] for r in rows if r["rate"] == x]))
        for x in rates
    ]
    return [float(np.log(rate)) for rate in rates], losses


def _vertex(logs: list[float], losses: list[float]) -> float:
    """Return the rate of lowest loss, between points where there is one on either side."""
    at = int(np.argmin(losses))
    if 0 < at < len(logs) - 1 and np.isfinite(losses[at - 1 : at + 2]).all():
        a, b, _ = np.polyfit(logs[at - 1 : at + 2], losses[at - 1 : at + 2], 2)
        return float(np.exp(-b / (2 * a)))
    return float(np.exp(logs[at]))


def _slope_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "method", "power", "best rate (loss) by rank", "slope", "spread", "one rate costs"
    )
    for row in rows:
        cost = row["one_rate_costs"]
        table.add_row(
            row["method"],
            f"{row['power']:g}",
            ", ".join(f"{r}: {row['best'][r]:.1e} ({row['loss'][r]:.4f})" for r in row["best"]),
            f"{row['slope']:+.2f}",
            f"{row['spread']:.1f}x",
            "-" if cost is None else f"{cost:.4f}",
        )
    return table


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("method", "range now", "best rate", "within 2 % of it", "loss", "position")
    for row in rows:
        table.add_row(
            row["method"],
            "{:.1e} to {:.1e}".format(*row["range"]),
            f"{row['best']:.1e}",
            "{:.1e} to {:.1e}".format(*row["good"]),
            f"{row['loss']:.4f}",
            f"{row['position']:.2f}",
        )
    return table


if __name__ == "__main__":
    main()
