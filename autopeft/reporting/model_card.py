"""The model card of an exported adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autopeft import methods
from autopeft.errors import SettingsError
from autopeft.plan_text import plan_summary
from autopeft.reporting.columns import AS_EXPORTED, facts, metrics_text, training_facts
from autopeft.reporting.front_view import FrontEntry, FrontView
from autopeft.tasks.registry import TASKS
from autopeft.utils.formatting import markdown_text

_FOLDER = '"path/to/this/folder"'


def model_card(
    shown: FrontView,
    digest: str,
    *,
    format: str = "peft",
    notes: Sequence[str] = (),
    plan: Mapping[str, Any] | None = None,
    serve: str = "",
    head_file: str = "",
    servable: str = "",
) -> str:
    """Return the README.md of one exported adapter: measurements, usage, sites, training, data.

    Args:
        shown: The search.
        digest: Digest of the candidate.
        format: What the folder holds: "peft", "lora", "merged" or "gguf".
        notes: What the export told, one line each.
        plan: Content of the adapter's plan.json, which says how its base model is loaded.
        serve: The command that serves the folder; "" if there is none.
        head_file: File of the new head, if it is one of its own.
        servable: The server that every plan of the search can be exported for.

    Raises:
        SettingsError: if there is no such candidate.
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
    usage = _loading(shown, entry, format, plan or {}, head_file)
    lines = [
        _front_matter(shown, entry),
        f"# {markdown_text(plan_summary(entry.candidate.plan))}",
        "",
        f"An adapter for {_code(shown.model)}, task {markdown_text(shown.task)}, found by autopeft "
        f"(candidate {_code(entry.digest)}).",
        "",
        *(
            [f"The search drew only plans that `autopeft export --for {servable}` can write.", ""]
            if servable
            else []
        ),
        *_section("Results", _table(["what", "value"], _results(shown, entry))),
        *(_table(["seed", "validation", "test"], seeds) if seeds else []),
        *([*(f"- {markdown_text(note)}" for note in notes), ""] if notes else []),
        *(_section("Serve", ["```bash", serve.replace("`", "'"), "```", ""]) if serve else []),
        *_section("Usage", ["```python", usage, "```", ""]),
        *(_section("Sites", _table(["layer", "role", "method", "rank"], sites)) if sites else []),
        *_section("Training", _table(["setting", "value"], training_facts(entry))),
        *_section("Data", _data(shown)),
    ]
    if shown.versions:
        words = ", ".join(
            f"{markdown_text(name)} {markdown_text(v)}" for name, v in shown.versions.items()
        )
        lines += _section("Versions", [f"{words}.", ""])
    return "\n".join(lines)


def _results(shown: FrontView, entry: FrontEntry) -> list[tuple[str, str]]:
    """Return what is known of a member; a note tells what this export of it scored, if it did."""
    return [(name, text) for name, text in facts(shown, entry) if name != AS_EXPORTED]


def _word(text: str) -> str:
    """Text of others without what a page could take for markup."""
    return re.sub(r"[^\w .-]+", " ", text).strip()[:100] or "unnamed"


def _section(title: str, lines: Iterable[str]) -> list[str]:
    return [f"## {title}", "", *lines]


def _code(text: object) -> str:
    """An inline code span; backticks, which could end it, become quotes."""
    return "`" + " ".join(str(text).split()).replace("`", "'").replace("|", "¦") + "`"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return [*lines, *("| " + " | ".join(map(markdown_text, row)) + " |" for row in rows), ""]


def _front_matter(shown: FrontView, entry: FrontEntry) -> str:
    """The card's YAML head, as model hubs read it; a local folder is no base model there."""
    from huggingface_hub import ModelCardData

    is_id = re.fullmatch(r"[\w-]+/[\w.-]+", shown.model) and not Path(shown.model).exists()
    content = ModelCardData(
        base_model=shown.model if is_id else None,
        library_name="autopeft",
        tags=["autopeft", "adapter", *entry.candidate.plan.methods],
        model_name=entry.digest,
        eval_results=_eval_results(shown, entry),
    )
    return f"---\n{content.to_yaml()}\n---\n"


def _eval_results(shown: FrontView, entry: FrontEntry) -> list[Any]:
    """The quality as model hubs read it: of the test split if it was confirmed."""
    from huggingface_hub import EvalResult

    name, data = shown.quality.name, shown.settings.get("data")
    value = entry.objectives.get(name)
    if not isinstance(value, int | float):
        return []
    first = str(data[0] if isinstance(data, list | tuple) and data else data or shown.task)
    is_id = re.fullmatch(r"[\w-]+(/[\w.-]+)?", first) and not Path(first).exists()
    return [
        EvalResult(
            task_type=_word(shown.task),
            dataset_type=first if is_id else "custom",
            dataset_name=_word(Path(first).name),
            dataset_split="test" if entry.is_confirmed and shown.is_held_out else "validation",
            metric_type=_word(name),
            metric_value=float(value),
        )
    ]


def _loading(
    shown: FrontView, entry: FrontEntry, format: str, plan: Mapping[str, Any], head_file: str
) -> str:
    """Python that loads what the folder holds as `model`, and uses it.

    PEFT alone loads plain LoRA layers; autopeft loads every method, over the weights that it was
    trained over.
    """
    is_lora = all(methods.get(name).holds_lora_factors for name in entry.candidate.plan.methods)
    is_plain = is_lora and len(entry.candidate.plan.methods) == 1
    # transformers alone would load the whole weights of a base model that was quantized.
    is_quantized = plan.get("quantization", "none") != "none"
    if format == "peft" and (is_quantized or not is_plain):
        load = f"""import autopeft

checkpoint = {_python(shown.model)}
model = autopeft.load_adapter(checkpoint, {_FOLDER})"""
    elif format == "merged":
        loader = _loader(shown, plan)
        load = f"""from transformers import {loader}

checkpoint = {_FOLDER}
model = {loader}.from_pretrained(checkpoint)"""
    else:
        load = _base_loading(shown, plan)
        if head_file:
            load = f"""from safetensors.torch import load_file
{load}
model.load_state_dict(load_file({_FOLDER} + "/{head_file}"), strict=False)  # The new head."""
        if format == "gguf":
            # llama.cpp loads the adapter; Python gets the base model, and the head if there is one.
            return load
        load = f"""from peft import PeftModel
{load}
model = PeftModel.from_pretrained(model, {_FOLDER}).eval()"""
    # A backtick could end the block of code; none of autopeft's own lines has one.
    usage = shown.data.usage.replace("`", "'")
    return f"{load}\n\n{usage}" if usage else load


def _loader(shown: FrontView, plan: Mapping[str, Any]) -> str:
    """The class of transformers that loads the base model."""
    task = TASKS[shown.task].auto_class if shown.task in TASKS else "AutoModel"
    return str(plan.get("auto_class", task))


def _base_loading(shown: FrontView, plan: Mapping[str, Any]) -> str:
    """Python that loads the base model as `model`."""
    loader = _loader(shown, plan)
    given = dict(plan.get("model_kwargs", {}))
    if "id2label" in given:
        given["id2label"] = {int(key): name for key, name in given["id2label"].items()}
    if plan.get("replaces_head"):
        given["ignore_mismatched_sizes"] = True
    if plan.get("revision"):
        given["revision"] = plan["revision"]
    arguments = "".join(f",\n    {name}={_python(value)}" for name, value in given.items())
    return f"""from transformers import {loader}

checkpoint = {_python(shown.model)}
model = {loader}.from_pretrained(
    checkpoint{arguments},
)"""


def _python(value: object) -> str:
    """A value as Python; its text cannot end the block of code."""
    return repr(value).replace("`", "\\x60")


def _data(shown: FrontView) -> list[str]:
    data = shown.data
    lines = [f"{markdown_text(data.headline())}:", ""] if data.task else []
    lines += [f"- {markdown_text(line)}" for line in data.lines()]
    if data.labels:
        lines += ["", f"Labels: {', '.join(markdown_text(label) for label in data.labels)}."]
    lines.append("")
    if data.fingerprint:
        lines.append(f"Fingerprint {_code(data.fingerprint)}.")
    return [*lines, ""]
