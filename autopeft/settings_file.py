"""Write a commented settings file for a model and data: `autopeft init`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.tasks.data import TaskData


def settings_text(settings: SearchSettings, task: Task, data: TaskData) -> str:
    """Return a settings file in YAML that says where each value comes from.

    Args:
        settings: Model and data, as asked for.
        task: The task, recognized or named.
        data: The data, encoded for it.
    """
    found = "\n".join(f"#   {line}" for line in data.summary().lines())
    metrics = task.metric_names()
    own = {role: name for role, name in data.columns.items() if hasattr(settings, role)}
    further = {role: name for role, name in data.columns.items() if role not in own}
    head = {"model": settings.model, "data": settings.data}
    for name in ("validation", "test", "data_name", "data_revision", "model_revision"):
        if getattr(settings, name) is not None:
            head[name] = getattr(settings, name)
    return f"""\
# Settings of a search: autopeft search THIS_FILE --output FOLDER
# `autopeft preview THIS_FILE` shows rows as the model sees them, `autopeft price THIS_FILE` costs.

# Found in the data:
{found}
{_yaml(head)}
# {task.description} (`autopeft tasks` lists all)
{_yaml({"task": task.name, **own, **({"columns": further} if further else {})})}
# One of {metrics}.
{_yaml({"metric": task.quality.name})}
# Longest row, in tokens: {settings_source(settings)}.
{_yaml({"max_length": data.max_length}) if data.max_length else ""}
# What to trade the metric against, and the search space (`autopeft spaces`).
{_yaml({"objectives": list(settings.objectives), "space": settings.space})}
# What the search may spend: time (30m, 2h), trials (50trials) or both (2h,200trials).
{_yaml({"budget": settings.budget, "seed": settings.seed})}"""


def settings_source(settings: SearchSettings) -> str:
    """Return in words what decided the length of a row."""
    return "as asked for" if settings.max_length is not None else "the rows' own lengths decide"


def _yaml(values: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    return text
