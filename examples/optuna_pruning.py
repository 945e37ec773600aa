"""Prune an ordinary Optuna study of two objectives, accuracy and parameters, and see what it saves.

A small network learns digits. The same random candidates are trained without a pruner, with
`autopeft.GapPruner`, and with it again for as many epochs as the first study took:

    python examples/optuna_pruning.py
    python examples/optuna_pruning.py --sampler tpe --seeds 10

autopeft's search is not involved, and neither torch nor peft is imported.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

import autopeft

End = Callable[[optuna.Study], bool]

SAMPLERS = {
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(population_size=20, seed=seed),
}

images, labels = load_digits(return_X_y=True)
images = images / 16.0
train_x, rest_x, train_y, rest_y = train_test_split(images, labels, test_size=0.5, random_state=0)
valid_x, test_x, valid_y, test_y = train_test_split(rest_x, rest_y, test_size=0.5, random_state=0)


@autopeft.prunable
def objective(trial: optuna.Trial, n_epochs: int) -> tuple[float, int]:
    """Train a network; a study of one objective would do the same without the decorator."""
    width = trial.suggest_int("width", 2, 256, log=True)
    network = MLPClassifier(
        (width,),
        learning_rate_init=trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True),
        alpha=trial.suggest_float("alpha", 1e-6, 1e-1, log=True),
        batch_size=trial.suggest_categorical("batch_size", [16, 64, 256]),
        random_state=trial.number,
    )
    n_params = (64 + 1) * width + (width + 1) * 10
    trial.set_user_attr("price", {"n_params": n_params})
    for epoch in range(n_epochs):
        network.partial_fit(train_x, train_y, classes=range(10))
        accuracy = network.score(valid_x, valid_y)
        trial.report(accuracy, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    trial.set_user_attr("test_accuracy", network.score(test_x, test_y))
    return accuracy, n_params


def run(options: argparse.Namespace, seed: int, pruner: optuna.pruners.BasePruner, end: End) -> Any:
    """Run a study trial by trial until it has ended."""
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=SAMPLERS[options.sampler](seed), pruner=pruner
    )
    while not end(study):
        study.optimize(partial(objective, n_epochs=options.epochs), n_trials=1)
    return study


def epochs(study: optuna.Study) -> int:
    """Return how many epochs all trials of a study took."""
    return sum(len(trial.intermediate_values) for trial in study.trials)


def front_quality(study: optuna.Study, attribute: str | None = None) -> float:
    """Return the mean, over budgets of parameters, of the accuracy that the front has for them.

    This is the hypervolume of accuracy and log(parameters), as a share of its rectangle.
    """
    members = sorted(study.best_trials, key=lambda trial: trial.values[1])
    reached = []
    for budget in np.geomspace(160, 19_300, 200):
        allowed = [trial for trial in members if trial.values[1] <= budget]
        # Of those within the budget, the study would hand out the most accurate on validation.
        best = max(allowed, key=lambda trial: trial.values[0], default=None)
        if best is None:
            reached.append(0.0)
        else:
            reached.append(best.user_attrs[attribute] if attribute else best.values[0])
    return statistics.mean(reached)


def compare(options: argparse.Namespace, seed: int) -> dict[str, optuna.Study]:
    """Run three studies of one seed."""
    gap = autopeft.GapPruner(n_steps=options.epochs, n_warmup_steps=3)

    def as_many_trials(study: optuna.Study) -> bool:
        return len(study.trials) >= options.trials

    whole = run(options, seed, optuna.pruners.NopPruner(), as_many_trials)
    pruned = run(options, seed, gap, as_many_trials)
    longer = run(options, seed, gap, lambda study: epochs(study) >= epochs(whole))
    return {"no pruner": whole, "gap, as many trials": pruned, "gap, as many epochs": longer}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for each study, and the means."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sampler", choices=SAMPLERS, default="random")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", ConvergenceWarning)
    found: dict[str, list[tuple[float, ...]]] = {}
    print("seed  study                trials  pruned  epochs  front (validation)  front (test)")
    for seed in range(options.seeds):
        for name, study in compare(options, seed).items():
            n_pruned = sum(trial.state == TrialState.PRUNED for trial in study.trials)
            row = (len(study.trials), n_pruned, epochs(study), front_quality(study))
            found.setdefault(name, []).append((*row, front_quality(study, "test_accuracy")))
            print(_line(str(seed), name, found[name][-1]))
    for name, rows in found.items():
        print(_line("mean", name, [statistics.mean(column) for column in zip(*rows, strict=True)]))


def _line(seed: str, name: str, row: Sequence[float]) -> str:
    trials, pruned, n_epochs, valid, test = row
    return (
        f"{seed:4}  {name:19}  {trials:6.0f}  {pruned:6.0f}  {n_epochs:6.0f}  {valid:18.4f}  "
        f"{test:12.4f}"
    )


if __name__ == "__main__":
    main()
