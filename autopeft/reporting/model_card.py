"""report.md, and the model card that travels with an exported adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml

from autopeft.costs.objectives import Objective
from autopeft.errors import SettingsError
from autopeft.plan_text import plan_summary
from autopeft.reporting.front_view import Entry, FrontView, view
from autopeft.reporting.record import RunRecord
from autopeft.reporting.tables import (
    heading,
    levels_by_digest,
    marks,
    quality_text,
    rows_of,
    versus,
)
from autopeft.utils.formatting import human_seconds, human_value

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&])")


def plain(text: object) -> str:
    """Text as Markdown shows it: one line, nothing in it read as markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def _code(text: object) -> str:
    """An inline code span; backticks, which could end it, become quotes."""
    return "`" + " ".join(str(text).split()).replace("`", "'").replace("|", "¦") + "`"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _value(entry: Entry, objective: Objective) -> str:
    value = human_value(entry.objectives[objective.name], objective.unit)
    if objective.is_known:
        return f"{value} (exact: {entry.objectives[objective.name]:,.0f})"
    interval = entry.objectives_ci.get(objective.name)
    if interval is None:
        return value
    low, high = (human_value(end, objective.unit) for end in interval)
    return f"{value} (95 % interval {low} to {high})"


def _split(entry: Entry) -> str:
    return "test" if entry.is_confirmed else "validation"


def _front_matter(shown: FrontView, entry: Entry) -> str:
    """The card's YAML head, as model hubs read it; a local folder is no base model there."""
    tags = ["autopeft", "adapter", *entry.candidate.plan.methods]
    content: dict[str, object] = {"library_name": "autopeft", "tags": tags}
    if re.fullmatch(r"[\w-]+/[\w.-]+", shown.model) and not Path(shown.model).exists():
        content["base_model"] = shown.model
    text: str = yaml.safe_dump(content, sort_keys=False)
    return f"---\n{text}---\n"


def _measured(shown: FrontView, entry: Entry) -> list[str]:
    names = ((f"{o.name} ({_split(entry)})" if i == 0 else o.name, o) for i, o in _numbered(shown))
    rows = [(plain(name), plain(_value(entry, objective))) for name, objective in names]
    lines = ["## Measured", "", *_table(["what", "value"], rows)]
    if entry.seeds:
        seeds = [
            (str(s.seed), _metrics(s.validation), _metrics(s.test))
            for s in sorted(entry.seeds, key=lambda s: s.seed)
        ]
        lines += _table(["seed", "validation", "test"], seeds)
    if entry.adapter_score is not None:
        score = entry.adapter_score
        lines += [
            f"The saved weights are those of seed {score.seed}; on the {score.n_rows} rows of the "
            f"{plain(score.split)} split they score {_metrics(score.metrics)}.",
            "",
        ]
    return lines


def _numbered(shown: FrontView) -> Iterable[tuple[int, Objective]]:
    return enumerate(shown.objectives)


def _metrics(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{plain(name)} {value:.4f}" for name, value in sorted(metrics.items()))


def _against_lora(shown: FrontView, entry: Entry) -> list[str]:
    level = levels_by_digest(shown).get(entry.digest)
    if level is None:
        return []
    low, high = level.gain_ci
    return [
        f"Against the tuned LoRA it {level.result}: {level.gain:+.4f} {plain(shown.quality.name)} "
        f"(corrected 95 % interval {low:+.4f} to {high:+.4f}) at {level.cost_ratio:.3g} times its "
        "cost.",
        "",
    ]


def _placement(entry: Entry) -> list[str]:
    specs = entry.candidate.plan.specs
    if not specs:
        return []
    rows = [
        (str(spec.layer), _code(spec.role), plain(spec.method), str(spec.rank or ""))
        for spec in specs
    ]
    return ["## Where it sits", "", *_table(["layer", "role", "method", "rank"], rows)]


def _training(entry: Entry) -> list[str]:
    train = entry.candidate.train.to_json()
    rates = train.pop("method_rates")
    rows = [(_code(name), plain(value)) for name, value in train.items()]
    rows += [(_code(f"learning_rate ({method})"), plain(rate)) for method, rate in rates.items()]
    return ["## How it was trained", "", *_table(["setting", "value"], rows)]


def model_card(
    result: RunRecord | FrontView,
    digest: str,
    *,
    format: str = "peft",
    notes: Sequence[str] = (),
) -> str:
    """The README.md of one exported adapter: measured numbers, placement, training, how to load.

    Args:
        result: A record, or what `read_front` gave.
        digest: The candidate's digest.
        format: What the folder holds: "peft", "lora" or "merged".
        notes: What the export found, a line each.

    Raises:
        SettingsError: if no entry of the result has that digest.
    """
    shown = view(result) if isinstance(result, RunRecord) else result
    entry = shown.find(digest)
    if entry is None:
        raise SettingsError(
            "digest", digest, "no such candidate", "use a digest of front.json's front"
        )
    plan = entry.candidate.plan
    model = json.dumps(shown.model, ensure_ascii=False).replace("`", "\\u0060")
    lines = [
        _front_matter(shown, entry),
        f"# {plain(plan_summary(plan))}",
        "",
        f"An adapter for {_code(shown.model)}, task {plain(shown.task)}, found by autopeft "
        f"(candidate {_code(entry.digest)}, origin {plain(entry.origin)}).",
        "",
        *_measured(shown, entry),
        *_against_lora(shown, entry),
        *([f"- {plain(note)}" for note in notes] + [""] if notes else []),
        "## Loading",
        "",
        "```python",
        *_loading(shown, model, format),
        "```",
        "",
        *_placement(entry),
        *_training(entry),
        *_data(shown),
        *_versions(shown),
    ]
    return "\n".join(lines)


_KINDS: Mapping[str, str] = {
    "peft": "An adapter",
    "lora": "An adapter, written as one LoRA,",
    "merged": "The model with an adapter folded in,",
}

_LOADERS: Mapping[str, str] = {
    "text-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
}


def _loading(shown: FrontView, model: str, format: str) -> list[str]:
    if format == "peft":
        return [
            "import autopeft",
            "",
            f'model = autopeft.load_adapter({model}, "path/to/this/folder")',
        ]
    loader = _LOADERS.get(shown.task, "AutoModel")
    if format == "merged":
        return [
            f"from transformers import {loader}",
            "",
            f'model = {loader}.from_pretrained("path/to/this/folder")',
        ]
    labels = f", num_labels={len(shown.data.labels)}" if shown.data.labels else ""
    return [
        "from peft import PeftModel",
        f"from transformers import {loader}",
        "",
        f"base = {loader}.from_pretrained({model}{labels})",
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
    ]


def _data(shown: FrontView) -> list[str]:
    data = shown.data
    rows = ", ".join(f"{n} {plain(split)}" for split, n in data.rows.items())
    lines = ["## Data", "", f"Rows: {rows or 'unknown'}; {data.dropped_rows} dropped."]
    if data.labels:
        lines.append(f"Labels: {', '.join(plain(label) for label in data.labels)}.")
    if data.fingerprint:
        lines.append(f"Fingerprint {_code(data.fingerprint)}.")
    return [*lines, ""]


def _versions(shown: FrontView) -> list[str]:
    if not shown.versions:
        return []
    words = ", ".join(f"{plain(name)} {plain(v)}" for name, v in shown.versions.items())
    return ["## Versions", "", f"{words}.", ""]


def front_rows(shown: FrontView) -> list[list[str]]:
    """Cells of the front's table: mark, digest, costs, quality, rate, against LoRA, adapter."""
    levels = levels_by_digest(shown)
    return [
        [
            marks(shown, entry),
            entry.digest,
            *(human_value(entry.objectives[c.name], c.unit) for c in shown.costs),
            quality_text(shown, entry),
            f"{entry.candidate.train.learning_rate:.2g}",
            versus(shown, entry, levels),
            entry.summary,
        ]
        for entry in rows_of(shown)
    ]


def report_markdown(shown: FrontView) -> str:
    """The text of report.md: verdict, front, budget, data, warnings, versions."""
    header = ["", "digest", *(heading(c.name) for c in shown.costs), shown.quality.name]
    header += ["rate", "vs LoRA", "adapter"]
    split = "test" if shown.is_confirmed else "validation"
    counts = ", ".join(f"{n} {state}" for state, n in shown.trials.items())
    budget = shown.budget
    times = [(plain(name), human_seconds(seconds)) for name, seconds in budget.phases.items()]
    lines = [
        f"# {plain(shown.verdict.text)}",
        "",
        f"Model {_code(shown.model)}, task {plain(shown.task)}, budget {plain(budget.limit)}: "
        f"{budget.n_trials} trials ({counts}) in {human_seconds(budget.spent_seconds)}.",
        "",
        "## The front",
        "",
        f"{plain(shown.quality.name)} on the {split} split, ± half a 95 % interval. "
        "\\* the pick, L the tuned LoRA, - not on the front.",
        "",
        *_table([plain(h) for h in header], ([plain(c) for c in r] for r in front_rows(shown))),
        "![front](plots/front.png)",
        "",
        "## Time",
        "",
        *_table(["phase", "spent"], times),
        *([f"Rungs: {plain(shown.fidelity.text())}.", ""] if shown.fidelity else []),
        *_data(shown),
        *_warnings(shown),
        *_versions(shown),
    ]
    return "\n".join(lines)


def _warnings(shown: FrontView) -> list[str]:
    if not shown.warnings:
        return []
    return ["## Warnings", "", *(f"- {plain(line)}" for line in shown.warnings), ""]
