"""How fast a proxy training is, beside what a user would write: HF Trainer, as it is and tuned.

    python examples/benchmarks/speed.py --output speed.json

All in one run on one machine, one thread, turn by turn, so that a busy machine slows all alike;
medians are reported, and ratios are what counts. Five tables:

1. a training step: Trainer with its defaults, Trainer with rows grouped by length and bf16, and
   autopeft, for adapters in all blocks, in the upper half, and in the last one;
2. the share of this machine's measured matrix-multiply peak that these steps reach, and how fast
   one would be that reached all of it;
3. what a step costs over depth, length of rows, rank, and workers that train at once;
4. whether candidates packed into one forward pass train faster than one after another;
5. what the search itself costs: ask, report and tell over the number of trials, 80 blocks.

`--tables steps` measures the first two only; `--model smollm2` the decoder of
examples/smollm2.yaml instead of MiniLM.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from autopeft.costs import Price, PriceTable, Topology
from autopeft.engine.executor import Executor
from autopeft.engine.job_execution import JobExecution
from autopeft.engine.messages import Job, WorkerContext
from autopeft.engine.worker_environment import worker_environment
from autopeft.models.attach import Attached, attach
from autopeft.models.backbone import Backbone
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.preparing.prepare import prepare
from autopeft.preparing.prepared import PreparedSearch
from autopeft.searcher.controller import SearchController
from autopeft.searcher.space.space import SearchSpace
from autopeft.settings import SearchSettings
from autopeft.tasks.batch import collate
from autopeft.tasks.data import SplitName
from autopeft.training.multi_trainer import MultiTrainer
from autopeft.training.precision import choose_precision
from autopeft.training.setup import TrainingSetup
from autopeft.training.trainer import Trainer
from autopeft.utils.hardware import matmul_flops_per_second, n_cores

_RANK = 8
_FREE = Price(0, 0, 0.0, 0)  # The benchmark measures costs itself.
_CACHE = "~/.cache/autopeft"
_TABLES = ("steps", "growth", "packs", "search")
_SETTINGS: dict[str, dict[str, Any]] = {
    "minilm": {
        "model": f"{_CACHE}/all-MiniLM-L6-v2",
        "data": f"{_CACHE}/movie_snippets.csv",
        "max_train_rows": 1000,
        "max_validation_rows": 50,
        "max_test_rows": 50,
        "batch_size": 16,
    },
    "smollm2": {
        "model": f"{_CACHE}/SmolLM2-135M-Instruct",
        "data": f"{_CACHE}/movie_sft.csv",
        "task": "sft",
        "max_train_rows": 200,
        "max_validation_rows": 20,
        "max_test_rows": 20,
        "max_length": 64,
        "batch_size": 8,
    },
}


@dataclass
class Runner:
    """Something that can train a few more steps and tells how long each took.

    Attributes:
        name: A column.
        run: Number of steps -> seconds of each.
        seconds: All of them so far.
    """

    name: str
    run: Callable[[int], list[float]]
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds a step."""
        return statistics.median(self.seconds)


def main() -> None:
    """Measures, prints, writes."""
    options = _options()
    torch.set_num_threads(1)
    settings = SearchSettings.from_mapping(
        {
            **_SETTINGS[options.model],
            **({"model": options.folder} if options.folder else {}),
            **({"data": options.data} if options.data else {}),
            "steps": 100_000,
        }
    )
    ready = prepare(settings)
    console = Console()
    result: dict[str, Any] = {"model": options.model, "rounds": options.rounds}
    if "steps" in options.tables:
        result["steps"] = steps = _step_times(ready, options)
        console.print(_steps_table(steps))
        result["peak"] = peak = _peak(ready, steps)
        console.print(_peak_table(peak))
    if "growth" in options.tables:
        result["growth"] = growth = _growth(ready, options)
        console.print(_growth_table(growth))
    if "packs" in options.tables:
        result["packs"] = packs = _pack_gain(ready, options)
        console.print(_pack_table(packs))
    if "search" in options.tables:
        result["search"] = asks = _ask_times(options.trials)
        console.print(_ask_table(asks))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(_SETTINGS), default="minilm")
    parser.add_argument("--folder", default="", help="another model folder of that kind")
    parser.add_argument("--data", default="", help="another file of that kind")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=15, help="steps a turn")
    parser.add_argument("--trials", type=int, default=1000, help="of the search's own cost")
    parser.add_argument(
        "--tables",
        nargs="+",
        choices=_TABLES,
        default=_TABLES,
        help="which to measure (steps: the first two)",
    )
    parser.add_argument("--output", default="", help="JSON file to write")
    return parser.parse_args()


# --- 1: a step -----------------------------------------------------------------------------------


def _plan(topology: Topology, lowest: int, rank: int = _RANK) -> AdapterPlan:
    """LoRA on q and v (or what holds them) of all blocks from `lowest` up."""
    roles = [r for r in ("attn.q", "attn.v", "attn.qkv") if r in topology.shapes]
    return AdapterPlan(
        LayerSpec(layer, role, "lora", rank)
        for layer in range(lowest, topology.n_layers)
        for role in roles
    )


def _depths(n_layers: int) -> dict[str, int]:
    """What is adapted -> its lowest block."""
    return {"all blocks": 0, "upper half": n_layers // 2, "last block": n_layers - 1}


def _step_times(ready: PreparedSearch, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    n = ready.prices.topology.n_layers
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for depth, lowest in _depths(n).items():
            runners = [
                Runner("Trainer", _trainer(ready, lowest, folder, is_tuned=False)),
                Runner("Trainer tuned", _trainer(ready, lowest, folder, is_tuned=True)),
            ]
            with _worker(ready, lowest) as run:
                runners.append(Runner("autopeft", run))
                _take_turns(runners, options.rounds, options.steps)
            found[depth] = {runner.name: runner.median for runner in runners}
    return found


@contextmanager
def _worker(ready: PreparedSearch, lowest: int) -> Iterator[Callable[[int], list[float]]]:
    """autopeft's loop in a process started as a search starts its workers."""
    start = multiprocessing.get_context("spawn")
    ours, theirs = start.Pipe()
    process = start.Process(target=_work, args=(ready.context(), lowest, theirs), daemon=True)
    with mock.patch.dict(os.environ, worker_environment()):
        process.start()

    def run(steps: int) -> list[float]:
        ours.send(steps)
        seconds: list[float] = ours.recv()
        return seconds

    try:
        yield run
    finally:
        process.terminate()
        process.join()


def _work(context: WorkerContext, lowest: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    run = _ours(context, lowest)
    while True:
        pipe.send(run(pipe.recv()))


def _take_turns(runners: list[Runner], rounds: int, steps: int) -> None:
    for runner in runners:
        # Kernels are chosen, caches filled and memory found before the clock. A process that meets
        # lengths for the first time asks the system for their memory.
        runner.run(3 * steps)
    for _ in range(rounds):
        for runner in runners:
            runner.seconds += runner.run(steps)


def _trainer(
    ready: PreparedSearch, lowest: int, folder: str, *, is_tuned: bool
) -> Callable[[int], list[float]]:
    """What a user would write: peft's LoRA and transformers' Trainer."""
    import datasets
    import transformers
    from peft import LoraConfig, get_peft_model

    settings, task = ready.settings, ready.task
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model)
    loader = getattr(transformers, task.auto_class)
    base = loader.from_pretrained(settings.model, **task.model_kwargs())
    layout = Backbone(base).layout
    targets = [
        path
        for spec in _plan(layout.topology, lowest).specs
        for path in layout.modules[spec.layer, spec.role]
    ]
    is_lm = task.name == "sft"
    config = LoraConfig(
        r=_RANK,
        lora_alpha=2 * _RANK,
        target_modules=targets,
        task_type="CAUSAL_LM" if is_lm else "SEQ_CLS",
    )
    model = get_peft_model(base, config)
    rows = user_rows(ready)
    collator = (
        transformers.DataCollatorForSeq2Seq(tokenizer)
        if is_lm
        else transformers.DataCollatorWithPadding(tokenizer)
    )
    watch = _StepWatch()
    tuned: dict[str, Any] = {"train_sampling_strategy": "group_by_length", "bf16": True}

    def run(steps: int) -> list[float]:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=settings.rows_per_step,
            max_steps=steps + 1,
            learning_rate=1e-3,
            use_cpu=ready.device == "cpu",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **(tuned if is_tuned else {}),
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            data_collator=collator,
            callbacks=[watch],
        )
        watch.seconds.clear()
        trainer.train()
        return watch.seconds[1:]

    return run


def user_rows(ready: PreparedSearch, name: SplitName = "train") -> list[dict[str, Any]]:
    """Rows of a split as a user's own tokenization would give them."""
    split, found = ready.data.splits[name], []
    for row in range(len(split)):
        tokens = split.tokens[split.offsets[row] : split.offsets[row + 1]].tolist()
        target = int(split.targets[row])
        is_lm = ready.task.name == "sft"
        labels: Any = [-100] * target + tokens[target:] if is_lm else target
        found.append({"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels})
    return found


class _StepWatch:
    """A Trainer callback: seconds between the ends of steps, data loading included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = time.perf_counter()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda *_, **__: None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The clock starts."""
        self._last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """One more step."""
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def _ours(context: WorkerContext, lowest: int, rank: int = _RANK) -> Callable[[int], list[float]]:
    """autopeft's loop as a worker of a search runs it, in this process."""
    training = _training(Executor(context), lowest, rank)
    training.evaluate("train")  # The activation cache is filled before the clock starts.
    return lambda steps: _timed(training, steps)


def _training(executor: Executor, lowest: int, rank: int) -> Trainer:
    settings, topology = executor.context.settings, executor.backbone.topology
    train = TrainSettings(1e-3, steps=settings.steps, batch_size=settings.rows_per_step)
    candidate = Candidate(_plan(topology, lowest, rank), train)
    return JobExecution(executor, Job("search", candidate, _FREE, seed=0)).start()


def _timed(training: Trainer, steps: int) -> list[float]:
    """Seconds of each of some steps, trained in one go as between two rungs."""
    begun: list[float] = []
    next_rows = training.next_rows

    def noting() -> Any:
        begun.append(time.perf_counter())
        return next_rows()

    with mock.patch.object(training, "next_rows", noting):
        training.train_to(training.step + steps)
    begun.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(begun)]


def _steps_table(found: dict[str, dict[str, float]]) -> Table:
    table = Table("ms a step", *next(iter(found.values())), "x Trainer", "x tuned")
    for depth, row in found.items():
        table.add_row(
            depth,
            *(f"{1000 * seconds:.0f}" for seconds in row.values()),
            f"{row['Trainer'] / row['autopeft']:.1f}",
            f"{row['Trainer tuned'] / row['autopeft']:.1f}",
        )
    return table


# --- 2: the share of the machine -----------------------------------------------------------------


def _peak(ready: PreparedSearch, steps: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Priced FLOPs of each step a second, beside the best matrix product's.

    `ceiling` is how many times as fast as the default Trainer a step would be that does nothing but
    its matrix products, at that speed.
    """
    precision = Executor(ready.context()).setup.precision
    dtype = "bfloat16" if precision == "bf16" else "float32"
    peak = max(
        matmul_flops_per_second(ready.device, size=size, seconds=0.5, dtype=dtype)
        for size in (512, 1024, 2048)
    )
    train = TrainSettings(1e-3, steps=1, batch_size=ready.settings.rows_per_step)
    found: dict[str, Any] = {"precision": precision, "gflops_peak": peak / 1e9, "depths": {}}
    for depth, lowest in _depths(ready.prices.topology.n_layers).items():
        price = ready.prices.price(Candidate(_plan(ready.prices.topology, lowest), train))
        found["depths"][depth] = {
            "share": price.train_flops / steps[depth]["autopeft"] / peak,
            "ceiling": steps[depth]["Trainer"] * peak / price.train_flops,
        }
    return found


def _peak_table(found: dict[str, Any]) -> Table:
    name = f"{found['gflops_peak']:.0f} GFLOP/s {found['precision']} product"
    table = Table("of a", name, "x Trainer if it reached all")
    for depth, row in found["depths"].items():
        table.add_row(depth, f"{row['share']:.0%}", f"{row['ceiling']:.1f}")
    return table


# --- 3: growth -----------------------------------------------------------------------------------


def _growth(ready: PreparedSearch, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Median seconds of a step over depth, rank, length of rows, and workers at once."""
    n = ready.prices.topology.n_layers
    rows = []
    cases = {
        ("lowest adapted block", lowest): _ours(ready.context(), lowest)
        for lowest in range(0, n, max(1, n // 6))
    }
    cases |= {("rank", rank): _ours(ready.context(), 0, rank) for rank in (2, 32)}
    runners = {case: Runner(str(case), run) for case, run in cases.items()}
    _take_turns(list(runners.values()), max(2, options.rounds // 2), options.steps)
    for (what, value), runner in runners.items():
        rows.append({"over": what, "value": value, "seconds": runner.median})
    training = _training(Executor(ready.context()), 0, _RANK)
    lengths = ready.data.train.lengths
    order = np.argsort(lengths, kind="stable")
    for share in (0.1, 0.5, 0.9):
        middle = int(share * (len(order) - ready.settings.rows_per_step))
        picked = order[middle : middle + ready.settings.rows_per_step]
        batch = collate(ready.data, "train", picked, ready.device)
        seconds = statistics.median(_one_batch(training, batch) for _ in range(options.steps))
        rows.append(
            {"over": "tokens a row", "value": int(lengths[picked].max()), "seconds": seconds}
        )
    for n_workers in range(1, n_cores() + 1):
        seconds = _side_by_side(ready, n_workers, options)
        rows.append({"over": "workers at once", "value": n_workers, "seconds": seconds})
    return rows


def _side_by_side(ready: PreparedSearch, n_workers: int, options: argparse.Namespace) -> float:
    """Median seconds of a full-depth step of workers that all train."""
    with ExitStack() as stack, ThreadPoolExecutor(n_workers) as threads:
        runs = [stack.enter_context(_worker(ready, 0)) for _ in range(n_workers)]
        for steps in (3 * options.steps, options.rounds * options.steps):
            seconds = list(threads.map(lambda run, steps=steps: run(steps), runs))
    return statistics.median(itertools.chain(*seconds))


def _one_batch(training: Trainer, batch: Any) -> float:
    """Forward and backward of one batch in the loop's own precision."""
    from autopeft.training.attention import training_attention
    from autopeft.training.precision import autocast

    started = time.perf_counter()
    setup = training.setup
    with training_attention(setup.precision, "cpu"), autocast(setup.precision, "cpu"):
        loss = setup.task.loss(training.attached.model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - started


def _growth_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("over", "value", "ms a step")
    for row in rows:
        table.add_row(row["over"], str(row["value"]), f"{1000 * row['seconds']:.0f}")
    return table


# --- 4: packs ------------------------------------------------------------------------------------


def _pack_gain(ready: PreparedSearch, options: argparse.Namespace) -> list[dict[str, float]]:
    """Median seconds of a step of each of some candidates, alone and together."""
    rows = []
    for n_rows in (1, 4, ready.settings.rows_per_step):
        backbone, ranks = Executor(ready.context()).backbone, (2, 4, 8, 16)
        alone = _lanes(ready, backbone, ranks, n_rows)
        together = _lanes(ready, backbone, ranks, n_rows)
        packed = MultiTrainer(
            {index: training for index, (_, training) in enumerate(together)}, together[0][1].setup
        )

        def step_each(steps: int, lanes: list[tuple[Attached, Trainer]] = alone) -> list[float]:
            found = []
            for attached, training in lanes:
                attached.unpark()
                found.append(sum(_timed(training, steps)) / steps)
                attached.park()
            return [sum(found)]

        def step_all(
            steps: int,
            packed: MultiTrainer = packed,
            lanes: list[tuple[Attached, Trainer]] = together,
        ) -> list[float]:
            began = time.perf_counter()
            packed.train_to(lanes[0][1].step + steps)
            return [(time.perf_counter() - began) / steps]

        runners = [Runner("alone", step_each), Runner("together", step_all)]
        _take_turns(runners, options.rounds, options.steps)
        rows.append({"rows": n_rows, "alone": runners[0].median, "together": runners[1].median})
    return rows


def _lanes(
    ready: PreparedSearch, backbone: Backbone, ranks: tuple[int, ...], n_rows: int
) -> list[tuple[Attached, Trainer]]:
    """Full-depth LoRAs of these ranks, parked, with their trainings."""
    lanes = []
    precision = choose_precision("auto", ready.device, backbone.model)
    setup = TrainingSetup(ready.task, ready.data, ready.device, precision)
    train = TrainSettings(1e-3, steps=ready.settings.steps, batch_size=n_rows)
    for rank in ranks:
        attached = attach(backbone, Candidate(_plan(ready.prices.topology, 0, rank), train), seed=0)
        training = Trainer(attached, setup, train, seed=0)
        attached.park()
        lanes.append((attached, training))
    return lanes


def _pack_table(rows: list[dict[str, float]]) -> Table:
    table = Table("rows a step", "ms, 4 alone", "ms, 4 together", "gain")
    for row in rows:
        alone, together = row["alone"], row["together"]
        cells = (f"{1000 * alone:.0f}", f"{1000 * together:.0f}", f"{alone / together:.2f}")
        table.add_row(f"{row['rows']:.0f}", *cells)
    return table


# --- 5: the search itself ------------------------------------------------------------------------


def _ask_times(n_trials: int, *, n_blocks: int = 80) -> list[dict[str, float]]:
    """Milliseconds of ask, report and tell, without any training, in an SQLite study.

    Up to each mark the trials are random ones; then some that the search proposes are timed.
    """
    shapes = {
        "attn.q": (4096, 4096),
        "attn.v": (1024, 4096),
        "mlp.up": (14336, 4096),
        "mlp.down": (4096, 14336),
    }
    topology = Topology(n_blocks, shapes, head_params=8194)
    space = SearchSpace.from_source("default", topology, steps=99, batch_size=16)
    rng = np.random.default_rng(0)
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        controller = SearchController(
            space,
            ("accuracy", "trainable_params"),
            prices=PriceTable.from_topology(topology, batch_size=16),
            storage=f"sqlite:///{folder}/study.db",
            n_baselines=0,
            n_portfolio=0,
        )
        n_done = 0
        for mark in (n for n in (100, 300, 1000, 3000, 10_000) if n <= n_trials):
            while n_done < mark:
                controller.enqueue(space.sample_stratified(rng))
                _timed_trial(controller, rng)
                n_done += 1
            spent = [_timed_trial(controller, rng) for _ in range(7)]
            n_done += len(spent)
            ask, report, tell = (
                1000 * statistics.median(each) for each in zip(*spent, strict=True)
            )
            rows.append({"trials": mark, "ask_ms": ask, "report_ms": report, "tell_ms": tell})
    return rows


def _timed_trial(controller: SearchController, rng: np.random.Generator) -> tuple[float, ...]:
    """Seconds of one ask, one report and one tell."""
    times = [time.perf_counter()]
    trial = controller.ask()
    assert trial is not None
    times.append(time.perf_counter())
    controller.report(trial, 33, -0.5)
    times.append(time.perf_counter())
    quality = 0.5 + 0.02 * np.log(trial.costs.trainable_params + 1.0)
    controller.tell(trial, score=float(quality + 0.01 * rng.standard_normal()))
    times.append(time.perf_counter())
    return tuple(after - before for before, after in itertools.pairwise(times))


def _ask_table(rows: list[dict[str, float]]) -> Table:
    table = Table("trials", "ms an ask", "ms a report", "ms a tell")
    for row in rows:
        cells = (f"{row[key]:.1f}" for key in ("ask_ms", "report_ms", "tell_ms"))
        table.add_row(f"{row['trials']:.0f}", *cells)
    return table


if __name__ == "__main__":
    main()
