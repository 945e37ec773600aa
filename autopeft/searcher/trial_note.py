"""A trial's note in optuna-dashboard: its plan by block, how it was trained, how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autopeft.costs.objectives import Objective
from autopeft.plan import TrainSettings
from autopeft.plan_text import block_lines, plan_summary
from autopeft.trial import Trial
from autopeft.utils.formatting import human_bytes, human_count, human_value, markdown_text


def trial_note(trial: Trial, objectives: Sequence[Objective]) -> str:
    """Return the note of an ended trial, in Markdown."""
    lines = [f"**{plan_summary(trial.plan)}**, {trial.origin}. {_ending(trial)}", ""]
    if trial.plan.specs:
        lines += ["| blocks | adapters |", "|---|---|"]
        lines += [f"| {blocks} | {adapters} |" for blocks, adapters in block_lines(trial.plan)]
        lines.append("")
    lines.append(f"- **trained** with {_training(trial.train)}")
    lines.append(f"- **costs** {_costs(trial)}")
    results = _results(trial, objectives)
    lines += [f"- **results** on validation, one seed: {results}"] if results else []
    if trial.rungs:
        rungs = ", ".join(f"{score:.4g} at step {step}" for step, score in trial.rungs)
        lines.append(f"- **scores at the rungs** {rungs}")
    return "\n".join(lines)


def _ending(trial: Trial) -> str:
    if trial.audited_at:
        was = f"Would have been pruned at step {trial.audited_at}; trained on to check the pruning."
        return was if trial.state == "complete" else f"{was} {_reason(trial)}"
    if trial.broken:
        return f"Complete, but not on the front: breaks {', '.join(trial.broken)}."
    return "Complete." if trial.state == "complete" else _reason(trial)


def _reason(trial: Trial) -> str:
    """Return state and reason; as code, because it may be any text, such as an error's."""
    reason, state = " ".join(trial.reason.split()), trial.state.capitalize()
    if reason.startswith("pruned at step"):
        return f"P{reason[1:]}."
    return f"{state}: `{reason.replace('`', chr(39))}`" if reason else f"{state}."


def _training(train: TrainSettings) -> str:
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in train.method_rates)
    fixed = train.alpha
    alpha = f"alpha / rank {train.alpha_ratio:g}" if fixed is None else f"alpha {fixed:g}"
    return (
        f"learning rate {train.learning_rate:.3g}{f' ({rates})' if rates else ''}, "
        f"{alpha}, dropout {train.dropout:g}, "
        f"{train.steps} steps of {train.batch_size} rows"
    )


def _costs(trial: Trial) -> str:
    costs = trial.costs
    parts = [
        f"{costs.trainable_params:,} trainable parameters",
        f"{human_bytes(costs.adapter_bytes)} on disk",
        f"{human_count(costs.train_flops)} FLOPs of training",
        f"{human_bytes(costs.peak_memory_bytes)} of memory",
    ]
    return ", ".join(
        [*parts, *(f"{markdown_text(name)} {value:.4g}" for name, value in costs.others.items())]
    )


def _results(trial: Trial, objectives: Sequence[Objective]) -> str:
    """Return what training revealed: objectives, then everything else that was measured."""
    units = {
        **{name: "seconds" for name in trial.measured if name.endswith("_seconds")},
        **{objective.name: objective.unit for objective in objectives},
    }
    shown: Mapping[str, float] = {
        **{o.name: trial.values[o.name] for o in objectives if o.name in trial.values},
        **trial.measured,
    }
    known = {objective.name for objective in objectives if objective.is_known}
    return ", ".join(
        f"{markdown_text(name)} {human_value(value, units.get(name, ''))}"
        for name, value in shown.items()
        if name not in known
    )
