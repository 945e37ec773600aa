"""The model card of an exported adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from autopeft.errors import SettingsError
from autopeft.plan_text import plan_summary
from autopeft.reporting.columns import facts, metrics_text, training_facts
from autopeft.reporting.front_view import FrontEntry, FrontView
from autopeft.tasks.registry import TASKS

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&])")


def model_card(
    shown: FrontView, digest: str, *, format: str = "peft", notes: Sequence[str] = ()
) -> str:
    """Return the README.md of one exported adapter: measurements, sites, training, loading.

    `format` is what the folder holds: "peft", "lora" or "merged"; each note is one line.
    """
    entry = shown.find(digest)
    if entry is None:
        raise SettingsError(
            "digest", digest, "no such candidate", "use a digest of front.json's front"
        )
    seeds = [
        (str(s.seed), metrics_text(s.validation), metrics_text(s.test))
        for s in sorted(entry.seeds, key=lambda s: s.seed)
    ]
    sites = [
        (str(spec.layer), spec.role, spec.method, str(spec.rank or ""))
        for spec in entry.candidate.plan.specs
    ]
    lines = [
        _front_matter(shown, entry),
        f"# {_plain(plan_summary(entry.candidate.plan))}",
        "",
        f"An adapter for {_code(shown.model)}, task {_plain(shown.task)}, found by autopeft "
        f"(candidate {_code(entry.digest)}).",
        "",
        *_section("Results", _table(["what", "value"], facts(shown, entry))),
        *(_table(["seed", "validation", "test"], seeds) if seeds else []),
        *([*(f"- {_plain(note)}" for note in notes), ""] if notes else []),
        *_section("Loading", ["```python", *_loading(shown, format), "```", ""]),
        *(_section("Sites", _table(["layer", "role", "method", "rank"], sites)) if sites else []),
        *_section("Training", _table(["setting", "value"], training_facts(entry))),
        *_section("Data", _data(shown)),
    ]
    if shown.versions:
        words = ", ".join(f"{_plain(name)} {_plain(v)}" for name, v in shown.versions.items())
        lines += _section("Versions", [f"{words}.", ""])
    return "\n".join(lines)


def _section(title: str, lines: Iterable[str]) -> list[str]:
    return [f"## {title}", "", *lines]


def _plain(text: object) -> str:
    """Text as Markdown shows it: one line, nothing in it read as markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def _code(text: object) -> str:
    """An inline code span; backticks, which could end it, become quotes."""
    return "`" + " ".join(str(text).split()).replace("`", "'").replace("|", "¦") + "`"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return [*lines, *("| " + " | ".join(map(_plain, row)) + " |" for row in rows), ""]


def _front_matter(shown: FrontView, entry: FrontEntry) -> str:
    """The card's YAML head, as model hubs read it; a local folder is no base model there."""
    tags = ["autopeft", "adapter", *entry.candidate.plan.methods]
    content: dict[str, object] = {"library_name": "autopeft", "tags": tags}
    if re.fullmatch(r"[\w-]+/[\w.-]+", shown.model) and not Path(shown.model).exists():
        content["base_model"] = shown.model
    text: str = yaml.safe_dump(content, sort_keys=False)
    return f"---\n{text}---\n"


def _loading(shown: FrontView, format: str) -> list[str]:
    model = json.dumps(shown.model, ensure_ascii=False).replace("`", "\\u0060")
    if format == "peft":
        load = f'model = autopeft.load_adapter({model}, "path/to/this/folder")'
        return ["import autopeft", "", load]
    loader = TASKS[shown.task].auto_class if shown.task in TASKS else "AutoModel"
    if format == "merged":
        load = f'model = {loader}.from_pretrained("path/to/this/folder")'
        return [f"from transformers import {loader}", "", load]
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
    lines = [f"{_plain(data.headline())}:", ""] if data.task else []
    lines += [f"- {_plain(line)}" for line in data.lines()]
    if data.labels:
        lines += ["", f"Labels: {', '.join(_plain(label) for label in data.labels)}."]
    lines.append("")
    if data.fingerprint:
        lines.append(f"Fingerprint {_code(data.fingerprint)}.")
    return [*lines, ""]
