"""Train a candidate with a Trainer of transformers, or with any that is built on it (TRL)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn

from autopeft.engine.evaluate import TEST, Metrics, Result, TrialReport
from autopeft.errors import TrainingFailure
from autopeft.models.attach import attach
from autopeft.models.backbone import Backbone
from autopeft.models.loading import auto_class_of
from autopeft.models.peft_model import AdaptedModel
from autopeft.plan import Candidate

EVAL = "eval_"
"""Start of the names of the metrics of `Trainer.evaluate`."""

Rows = Callable[[transformers.Trainer, Any], Sequence[float]]


def get_peft_model(
    model: nn.Module,
    candidate: Candidate,
    *,
    seed: int = 0,
    role_map: Mapping[str, str | Sequence[str]] | None = None,
    head: Sequence[str] = (),
) -> AdaptedModel:
    """Return a model of transformers with a candidate's adapters, as a `PeftModel`.

    Args:
        model: The base model. It is frozen, and holds one candidate at a time;
            `get_peft_model(...).unload()` gives it back as it was.
        candidate: What to attach; its plan may be empty.
        seed: Decides the initial values.
        role_map: Where adapters can go, for a model whose modules are not recognized.
        head: Paths of modules that are new, e.g. "classifier"; they are initialized and trained.

    Raises:
        UserError: if the plan does not fit the model.

    Example:
        ```python
        base = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        model = get_peft_model(base, candidate, seed=seed)
        model.print_trainable_parameters()
        ```
    """
    config = getattr(model, "config", None)
    before = getattr(model, "_autopeft_backbone", None)
    backbone = before or Backbone(
        model,
        head=head,
        role_map=role_map,
        base_model=str(getattr(model, "name_or_path", "")),
        auto_class=auto_class_of(type(model).__name__, config) or "AutoModel",
    )
    # Decompositions of weights are computed once for all candidates on one model.
    model.__dict__["_autopeft_backbone"] = backbone
    return AdaptedModel(attach(backbone, candidate, seed=seed))


def training_arguments(candidate: Candidate, *, seed: int = 0, **others: Any) -> dict[str, Any]:
    """Return what a candidate says of `TrainingArguments`, and of the classes built on them.

    Args:
        candidate: What is trained.
        seed: Of the training.
        **others: Further arguments; they win.

    Returns:
        Steps, batch size, rate, warm-up, decay and seed; nothing is saved or logged elsewhere.

    Example:
        >>> from autopeft.integrations.transformers import training_arguments
        >>> candidate = autopeft.Candidate(
        ...     autopeft.AdapterPlan([]), autopeft.TrainSettings(1e-3, steps=60)
        ... )
        >>> training_arguments(candidate, output_dir="out")["max_steps"]
        60
    """
    train = candidate.train
    return {
        "max_steps": train.steps,
        "per_device_train_batch_size": train.batch_size,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": math.ceil(train.steps * train.warmup_fraction),
        "weight_decay": train.weight_decay,
        "seed": seed,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **others,
    }


def create_optimizer(model: AdaptedModel) -> torch.optim.Optimizer:
    """Return AdamW with each method's own learning rate."""
    train = model.attached.candidate.train
    groups = [
        {"params": list(group.parameters), "lr": group.learning_rate}
        for group in model.attached.parameter_groups()
    ]
    return torch.optim.AdamW(groups, weight_decay=train.weight_decay)


class SearchCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Evaluates a training at the rungs, reports it, and does what some methods need.

    Args:
        trainer: The trainer that it is added to.
        report: What the search gave the training function.
        metric: Name of the quality in what `Trainer.evaluate` returns, without "eval_".
    """

    def __init__(self, trainer: transformers.Trainer, report: TrialReport, metric: str) -> None:
        self._trainer = trainer
        self._report = report
        self._metric = metric

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Evaluate at a rung before the last one; a confirmation needs no rungs.

        It may raise a `TrialStopped`, when the time of the trial is up.
        """
        logged = state.log_history[-1] if state.log_history else {}
        self._report.on_step(state.global_step, logged.get("loss", math.nan))
        is_rung = state.global_step in self._report.rungs and state.global_step < state.max_steps
        control.should_evaluate = is_rung and not self._report.is_confirming
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
        """Report the quality, which may raise a `TrialStopped` that ends the training."""
        step = state.global_step
        if self._report.last_step < step < state.max_steps:
            self._report(step, _value(_named(metrics, EVAL), self._metric))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add the gradient of what a method adds to the loss."""
        penalty = self._trainer.model.attached.penalty()
        if penalty is not None:
            penalty.backward()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let methods act while the gradients still exist."""
        self._trainer.model.attached.after_update(state.global_step + 1)


def train(
    trainer: transformers.Trainer,
    report: TrialReport,
    *,
    metric: str = "loss",
    test: Any = None,
    rows: Rows | None = None,
) -> Result:
    """Train, evaluate and save a candidate: the body of a training function.

    The empty plan is evaluated without a training. A finalist's adapter is saved where the search
    finds it.

    Args:
        trainer: A Trainer of transformers or TRL, not started, whose model is of `get_peft_model`
            and whose `eval_dataset` is the validation split.
        report: What the search gave the training function.
        metric: Name of the quality in what `trainer.evaluate` returns, without "eval_".
        test: The test split, prepared like `eval_dataset`, scored for finalists only. Trainers of
            TRL prepare it if `eval_dataset` is a dict of "validation" and "test".
        rows: Called with the trainer and the split just scored; returns the quality of each row,
            whose mean is the metric, so that the verdict can compare finalists row by row.

    Returns:
        Metrics without "eval_", those of the test split with "test_"; with the rows, if asked.

    Raises:
        TrialStopped: if the search stops the trial.
        TrainingFailure: if the loss or the metric is no finite number.

    Example:
        ```python
        def evaluate(candidate, *, seed, report):
            base = AutoModelForCausalLM.from_pretrained(MODEL)
            model = get_peft_model(base, candidate, seed=seed)
            args = SFTConfig(**training_arguments(candidate, seed=seed, output_dir="out"))
            trainer = SFTTrainer(model, args, train_dataset=train_rows, eval_dataset=valid_rows)
            return train(trainer, report, test=test_rows)
        ```
    """
    model = trainer.model
    if not isinstance(model, AdaptedModel):
        raise TrainingFailure(
            f"the trainer's model is a {type(model).__name__}; give it what get_peft_model returns"
        )
    # What it prints would stand in the middle of the search's progress.
    trainer.remove_callback(transformers.PrinterCallback)
    if isinstance(trainer.eval_dataset, dict):
        # Not scored at the rungs, where a dict would be scored as a whole.
        test = trainer.eval_dataset.get("test", test)
        trainer.eval_dataset = trainer.eval_dataset["validation"]
    if any(p.requires_grad for p in model.parameters()):
        if trainer.optimizer is None:
            trainer.optimizer = create_optimizer(model)
        trainer.add_callback(SearchCallback(trainer, report, metric))
        trainer.train()
    found = _named(trainer.evaluate(), EVAL)
    _value(found, metric)
    scored = trainer.eval_dataset
    if report.is_confirming and test is not None:
        unseen = trainer.evaluate(test, metric_key_prefix=TEST.rstrip("_"))
        found |= {TEST + name: value for name, value in _named(unseen, TEST).items()}
        scored = test
    if report.is_confirming:
        model.save_pretrained(report.folder)
    return (found, rows(trainer, scored)) if rows is not None else found


def _named(metrics: Metrics, prefix: str) -> dict[str, float]:
    return {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}


def _value(metrics: Metrics, name: str) -> float:
    if name not in metrics:
        known = ", ".join(metrics)
        raise TrainingFailure(f"the trainer's evaluate returns no {name}; it returns {known}")
    return metrics[name]
