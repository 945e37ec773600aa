"""Wall time to a front as good as a hand-written loop's: MiniLM on movie snippets, one thread.

    python examples/benchmarks/time_to_front.py --output time.json

The loop is what one would write: `study.optimize` with Optuna's TPE on quality and size, in each
trial a fresh model, peft's LoRA (rank, alpha, modules, depth, learning rate), and transformers'
Trainer with its defaults. autopeft then searches its default space with the same number of steps a
trial on the same rows. Fronts are chosen on validation; what is compared is their hypervolume on
the test split (accuracy over log trainable parameters), which no search saw and whose scoring is
not counted as time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import real
import torch
from rich.console import Console
from rich.table import Table
from speed import user_rows

from autopeft.preparing.prepare import prepare
from autopeft.preparing.prepared import PreparedSearch
from autopeft.settings import SearchSettings
from autopeft.tasks.data import SplitName


def main() -> None:
    """Runs both, prints the table, writes the file."""
    options = _options()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    console = Console()
    ready = prepare(SearchSettings.from_mapping(real.SETTINGS))
    span = ready.space.cost_range()
    runs = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        by_hand = list(_by_hand(ready, seed, options.trials))
        aim, limit = real.area(by_hand, *span), by_hand[-1]["seconds"]
        ours: list[dict[str, Any]] = []
        began = time.perf_counter()
        real.load(ready, 0)
        startup = time.perf_counter() - began
        for trial in real.ours(real.Search("autopeft", "", seed)):
            ours.append({**asdict(trial), "seconds": startup + trial.seconds})
            if real.area(ours, *span) >= options.beyond * aim or ours[-1]["seconds"] > limit:
                break
        runs.append({"seed": seed, "by_hand": by_hand, "autopeft": ours, "aim": aim})
        console.print(_table(runs[-1], span))
    if options.output:
        Path(options.output).write_text(json.dumps(runs, indent=1))
    ratios = [_ratio(run, span) for run in runs]
    console.print(f"time to equal hypervolume, by hand / autopeft: {_listed(ratios)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=20, help="of the hand-written loop")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--beyond", type=float, default=1.05, help="run until this multiple of its hypervolume"
    )
    parser.add_argument("--output", default="", help="JSON file to write")
    return parser.parse_args()


def _by_hand(ready: PreparedSearch, seed: int, n_trials: int) -> Iterator[dict[str, Any]]:
    """The hand-written loop; what each trial came to."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=optuna.samplers.TPESampler(seed=seed)
    )
    train = _data_set(ready, "train")
    validation, test = _data_set(ready, "validation"), _data_set(ready, "test")
    seconds = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(n_trials):
            began = time.perf_counter()
            trial = study.ask()
            trainer, params = _trainer(ready, trial, train, folder, seed)
            trainer.train()
            accuracy = _accuracy(trainer, validation)
            study.tell(trial, [accuracy, float(np.log(params))])
            seconds += time.perf_counter() - began
            yield {
                "seconds": seconds,
                "params": params,
                "validation": accuracy,
                "test": _accuracy(trainer, test),
                **trial.params,
            }


def _data_set(ready: PreparedSearch, name: SplitName) -> Any:
    import datasets

    return datasets.Dataset.from_list(user_rows(ready, name))


def _trainer(
    ready: PreparedSearch, trial: optuna.Trial, rows: Any, folder: str, seed: int
) -> tuple[Any, int]:
    """A fresh model with LoRA in a Trainer, and how many parameters it trains."""
    import transformers
    from peft import LoraConfig, get_peft_model

    settings = ready.settings
    transformers.set_seed(seed)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        settings.model, num_labels=len(ready.data.labels)
    )
    n_layers = base.config.num_hidden_layers
    modules = {"qv": ["query", "value"], "all": ["query", "key", "value", "dense"]}
    depth = trial.suggest_int("depth", 1, n_layers)
    rank = trial.suggest_categorical("rank", [1, 2, 4, 8, 16, 32])
    model = get_peft_model(
        base,
        LoraConfig(
            task_type="SEQ_CLS",
            r=rank,
            lora_alpha=rank * trial.suggest_categorical("alpha_ratio", [1, 2]),
            target_modules=modules[trial.suggest_categorical("modules", ["qv", "all"])],
            layers_to_transform=list(range(n_layers - depth, n_layers)),
            layers_pattern="layer",
        ),
    )
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=settings.rows_per_step,
        max_steps=settings.steps,
        learning_rate=trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
        use_cpu=ready.device == "cpu",
        seed=seed,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model)
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, sum(p.numel() for p in model.parameters() if p.requires_grad)


def _accuracy(trainer: Any, rows: Any) -> float:
    with contextlib.redirect_stdout(None):
        found = trainer.predict(rows)
    return float((found.predictions.argmax(-1) == found.label_ids).mean())


def _seconds_to(trials: Sequence[dict[str, Any]], aim: float, span: tuple[float, float]) -> float:
    """When the front first is as good; inf if never."""
    for n in range(1, len(trials) + 1):
        if real.area(trials[:n], *span) >= aim:
            return float(trials[n - 1]["seconds"])
    return float("inf")


def _ratio(run: dict[str, Any], span: tuple[float, float]) -> float:
    """At the loop's final hypervolume."""
    by_hand, ours = run["by_hand"], run["autopeft"]
    return _seconds_to(by_hand, run["aim"], span) / _seconds_to(ours, run["aim"], span)


def _table(run: dict[str, Any], span: tuple[float, float]) -> Table:
    table = Table("hypervolume", "by hand, s", "autopeft, s", "ratio")
    for share in (0.8, 0.9, 0.95, 1.0):
        aim = share * run["aim"]
        by_hand, ours = (_seconds_to(run[name], aim, span) for name in ("by_hand", "autopeft"))
        table.add_row(f"{aim:.4f}", f"{by_hand:.0f}", f"{ours:.0f}", f"{by_hand / ours:.1f}")
    return table


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.1f}" for number in numbers)


if __name__ == "__main__":
    main()
