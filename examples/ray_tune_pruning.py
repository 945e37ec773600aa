"""Stop trials of an ordinary Ray Tune run early, and keep the front of accuracy and parameters.

A small network learns digits. The same random candidates are trained without a scheduler, with
autopeft's `GapScheduler`, and with Tune's `ASHAScheduler`, which knows no costs:

    python examples/ray_tune_pruning.py
    python examples/ray_tune_pruning.py --seeds 5 --trials 100

autopeft's search is not involved, and neither torch nor peft is imported.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

import numpy as np
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator

from autopeft.integrations.ray_tune import GapScheduler

SPACE = {
    "width": tune.lograndint(2, 257),
    "learning_rate": tune.loguniform(1e-4, 1e-1),
    "alpha": tune.loguniform(1e-6, 1e-1),
    "batch_size": tune.choice([16, 64, 256]),
}


def n_params(config: dict[str, Any]) -> int:
    """Return the number of weights of a network, which is known before it is trained."""
    width: int = config["width"]
    return (64 + 1) * width + (width + 1) * 10


def train(config: dict[str, Any]) -> None:
    """Train a network and report its accuracy after each epoch."""
    # Imported here: this runs in Ray's workers.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier

    images, labels = load_digits(return_X_y=True)
    train_x, valid_x, train_y, valid_y = train_test_split(
        images / 16.0, labels, test_size=0.5, random_state=0
    )
    network = MLPClassifier(
        (config["width"],),
        learning_rate_init=config["learning_rate"],
        alpha=config["alpha"],
        batch_size=config["batch_size"],
        random_state=0,
    )
    for _ in range(config["n_epochs"]):
        network.partial_fit(train_x, train_y, classes=range(10))
        tune.report({"accuracy": network.score(valid_x, valid_y)})


def make_scheduler(name: str, n_epochs: int) -> Any:
    """Return the scheduler of that name: none, gap or asha."""
    if name == "gap":
        return GapScheduler(costs=n_params, max_t=n_epochs, grace_period=3)
    if name == "asha":
        return ASHAScheduler(max_t=n_epochs, grace_period=3, reduction_factor=3)
    return None


def run(options: argparse.Namespace, scheduler: Any, seed: int, folder: str) -> list[Any]:
    """Return the results of one run; the candidates depend on the seed alone."""
    tuner = tune.Tuner(
        train,
        param_space={**SPACE, "n_epochs": options.epochs},
        tune_config=tune.TuneConfig(
            metric="accuracy",
            mode="max",
            num_samples=options.trials,
            search_alg=BasicVariantGenerator(random_state=seed),
            scheduler=scheduler,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=folder, verbose=0),
    )
    return list(tuner.fit())


def front_quality(results: Sequence[Any]) -> float:
    """Return the mean, over budgets of parameters, of the best accuracy that fits.

    Only trials that were trained to the end count. This is the hypervolume of accuracy and
    log(parameters), as a share of its rectangle.
    """
    ended = [
        (n_params(result.config), result.metrics["accuracy"])
        for result in results
        if result.metrics["training_iteration"] == result.config["n_epochs"]
    ]
    budgets = np.geomspace(160, 19_300, 200)
    return statistics.mean(
        max((quality for cost, quality in ended if cost <= budget), default=0.0)
        for budget in budgets
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for each run, and the means."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--schedulers", default="none,gap,asha")
    parser.add_argument("--cpus", type=int, default=2)
    options = parser.parse_args(arguments)
    ray.init(
        address="local",  # Not another user's cluster on this machine.
        num_cpus=options.cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    found: dict[str, list[tuple[float, ...]]] = {}
    print("seed  scheduler  ended  epochs   front")
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for name in options.schedulers.split(","):
                results = run(options, make_scheduler(name, options.epochs), seed, folder)
                epochs = [result.metrics["training_iteration"] for result in results]
                row = (epochs.count(options.epochs), sum(epochs), front_quality(results))
                found.setdefault(name, []).append(row)
                print(_line(str(seed), name, row))
    for name, rows in found.items():
        print(_line("mean", name, [statistics.mean(column) for column in zip(*rows, strict=True)]))
    ray.shutdown()


def _line(seed: str, name: str, row: Sequence[float]) -> str:
    n_ended, n_epochs, quality = row
    return f"{seed:4}  {name:9}  {n_ended:5.0f}  {n_epochs:6.0f}  {quality:.4f}"


if __name__ == "__main__":
    main()
