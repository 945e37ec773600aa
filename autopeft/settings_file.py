"""Write a commented settings file for a model and data: `autopeft init`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.tasks.data import TaskData
from autopeft.utils.yaml_files import to_yaml

_WIDTH = 98


def settings_text(settings: SearchSettings, task: Task, data: TaskData) -> str:
    """Return a settings file in YAML that says where each value comes from.

    Args:
        settings: As asked for; what is not the default is kept.
        task: The task, recognized or named.
        data: The data, encoded for it.
    """
    defaults = {each.name: each.default for each in fields(settings)}
    asked = {k: v for k, v in settings.to_mapping().items() if getattr(settings, k) != defaults[k]}
    source = ("model", "model_revision", "data", "data_name", "data_revision", "validation", "test")
    problem = {"task": task.name, **({"columns": dict(data.columns)} if data.columns else {})}
    options = {**task.options, **(settings.task_options or {})}
    length = data.max_length or None
    sections = [
        (
            ["Found in the data:", *(f"  {line}" for line in data.summary().lines())],
            {name: asked[name] for name in source if name in asked},
        ),
        ([f"Learns {task.description} (`autopeft tasks` lists all)."], problem),
        (["Options of the task."], {"task_options": options} if options else {}),
        (
            [
                f"Quality to optimize: {task.metric_names()}, a scorer of scikit-learn, or a "
                "function of yours as package.module:name."
            ],
            {"metric": task.quality.name},
        ),
        (
            [f"Longest row, in tokens; {_source_of_length(settings)}."],
            {} if length is None else {"max_length": length},
        ),
        (
            ["Costs to trade the metric against, and the search space (`autopeft spaces`)."],
            {"objectives": list(settings.objectives), "space": asked.get("space", task.space)},
        ),
        (
            ["What the search may spend: time (30m), trials (50trials) or both (2h,200trials)."],
            {"budget": settings.budget, "seed": settings.seed},
        ),
    ]
    said = {*data.columns, *(name for _, values in sections for name in values)}
    sections.append((["As asked for."], {k: v for k, v in asked.items() if k not in said}))
    head = [
        "Settings of a search. What to do with this file:",
        "  autopeft preview FILE                   show rows as the model sees them",
        "  autopeft price FILE                     show what candidates cost",
        "  autopeft search FILE --output FOLDER    search",
    ]
    parts = [_comment(head)]
    parts += [_comment(lines) + _yaml(values) for lines, values in sections if values]
    return "\n".join(parts)


def _source_of_length(settings: SearchSettings) -> str:
    """Return in words what decided the length of a row."""
    return "as asked for" if settings.max_length is not None else "the rows' own lengths decided it"


def _comment(lines: list[str]) -> str:
    """Return lines as comments; whatever the data holds stays inside them."""
    wrapped = [
        textwrap.wrap(
            line,
            _WIDTH,
            initial_indent="# ",
            subsequent_indent="#     ",
            drop_whitespace=line == line.lstrip(),
            break_on_hyphens=False,
        )
        for line in lines
    ]
    return "".join(f"{line.rstrip()}\n" for part in wrapped for line in part)


def _yaml(values: Mapping[str, Any]) -> str:
    """Return each setting as a line."""
    options: dict[str, Any] = {"allow_unicode": True, "width": 10_000}
    texts = []
    for name, value in values.items():
        if isinstance(value, list | dict):
            inside = to_yaml(value, default_flow_style=True, **options)
            texts.append(f"{name}: {inside}")
        else:
            texts.append(to_yaml({name: value}, **options))
    return "".join(texts)
