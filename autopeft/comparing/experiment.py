"""A member of a front as an experiment of peft's `method_comparison`.

The names of files and columns are those of peft's `method_comparison/MetaMathQA`. What autopeft
does not know of a training is null.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftType

from autopeft.comparing.prior_file import SUCCESS
from autopeft.errors import AdapterError, SettingsError
from autopeft.models.adapter_files import CONFIG_FILE, TENSOR_FILE, SavedPlan
from autopeft.models.layout import roles_of_name
from autopeft.result import Member, SearchResult
from autopeft.training.trainer import MAX_GRADIENT_NORM
from autopeft.utils.files import replaced_folder, write_text
from autopeft.utils.serialize import read_json, strict_json

_TRAIN_CONFIG = (
    "model_id dtype max_seq_length batch_size batch_size_eval max_steps eval_steps compile use_gc "
    "query_template seed grad_norm_clip optimizer_type optimizer_kwargs lr_scheduler use_amp "
    "autocast_adapter_dtype generation_kwargs attn_implementation init_kv_cache_prefix"
).split()
"""The suite's training parameters."""

_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
_SYSTEM = ("system", "release", "version", "machine", "processor", "accelerator")

_ADAMW = "adamw"
"""The value of the setting `optimizer` that is the suite's AdamW."""


_OTHER_LINES = ("test accuracy", "forgetting")
"""Columns whose null has a line of its own."""


@dataclass(frozen=True)
class Experiment:
    """A written experiment.

    Attributes:
        folder: Holds `experiments/` and `results/`, to be copied into the suite's folder.
        name: The experiment's name in the suite: method and recipe.
        lines: What the suite cannot say of the training, one line each.
    """

    folder: Path
    name: str
    lines: tuple[str, ...]


def export_experiment(result: SearchResult, member: Member, target: Path) -> Experiment:
    """Write a member as an experiment: its configurations, and its result.

    Args:
        result: The search.
        member: One that was confirmed.
        target: Folder to write; it must not exist, or be empty.

    Raises:
        AdapterError: if no single configuration of peft is the member's plan.
        SettingsError: if it was trained by an optimizer that the suite has not.
    """
    assert member.folder is not None, "checked before"
    config = _with_short_names(_config(member.folder), member, result.view.n_layers)
    settings = dict(result.view.settings)
    if (optimizer := settings.get("optimizer", _ADAMW)) != _ADAMW:
        problem = "is no optimizer of the suite"
        raise SettingsError("optimizer", optimizer, problem, "search with optimizer=adamw")
    saved = SavedPlan.read(member.folder)
    method = str(config["peft_type"]).lower()
    short = result.base_model.rstrip("/").rpartition("/")[2]
    recipe = f"{short}-{member.digest[:8]}"
    parameters = _train_parameters(member, saved, result)
    score, lines = _score(member, saved, settings)
    row: dict[str, Any] = {
        "run_info": {
            "created_at": result.view.started,
            "total_time": None,
            "experiment_name": f"{method}/{recipe}",
            "peft_branch": None,
            "train_config": {name: parameters.get(name) for name in _TRAIN_CONFIG},
            "peft_config": config,
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": None,
            "accelerator_memory_max": None,
            "accelerator_memory_reserved_99th": None,
            "train_time": member.objectives.get("train_seconds"),
            "file_size": (member.folder / TENSOR_FILE).stat().st_size,
            "num_trainable_params": member.entry.price.trainable_params,
            "num_total_params": None,
            "status": SUCCESS,
            "metrics": [score],
        },
        "meta_info": {
            "model_info": {"sha": saved.revision, "created_at": None},
            "dataset_info": {_data_name(settings): {"sha": None, "created_at": None}},
            "package_info": _packages(result.view.versions),
            "system_info": dict.fromkeys(_SYSTEM),
            "pytorch_info": None,
        },
    }
    lines += _null_lines(row)
    with replaced_folder(target) as draft:
        place = draft / "experiments" / method / recipe
        write_text(place / CONFIG_FILE, strict_json(config))
        write_text(place / "training_params.json", strict_json(parameters))
        write_text(draft / "results" / f"{method}--{recipe}.json", strict_json(row))
        if target.exists():
            target.rmdir()  # Raises an error if it holds anything.
    return Experiment(target, f"{method}/{recipe}", tuple(lines))


def _config(folder: Path) -> dict[str, Any]:
    """Return the adapter's one configuration of peft, as it was before training."""
    path = folder / CONFIG_FILE
    remedy = "autopeft export --format lora writes one LoRA, if the plan has an equal one"
    if not path.is_file():
        problem = "mixes methods or sizes that no single configuration of peft holds"
        raise AdapterError("format", "hf-comparison", problem, remedy)
    config = read_json(path, dict[str, Any], field="adapter", remedy="resume the search")
    if config.get("peft_type") not in PeftType.__members__:
        problem = f"peft has no method {str(config.get('peft_type')).lower()}"
        raise AdapterError("format", "hf-comparison", problem, remedy)
    return {**config, "inference_mode": False}


def _with_short_names(config: dict[str, Any], member: Member, n_layers: int) -> dict[str, Any]:
    """Name modules as the suite does, such as "q_proj", where the plan has them in every block."""
    plan, targets = member.candidate.plan, config.get("target_modules")
    layers = {layer: {s.role for s in plan.specs if s.layer == layer} for layer in range(n_layers)}
    is_everywhere = len({frozenset(roles) for roles in layers.values()}) == 1
    if not is_everywhere or not isinstance(targets, list):
        return config
    names = sorted({target.rpartition(".")[2] for target in targets})
    if any(len(roles_of_name(name)) != 1 for name in names):
        return config  # Other modules may have the name too.
    return {**config, "target_modules": names}


def _train_parameters(member: Member, saved: SavedPlan, result: SearchResult) -> dict[str, Any]:
    """Return the training parameters that are known, as the suite names them."""
    train = member.candidate.train
    known = {
        "model_id": saved.base_model,
        "max_seq_length": result.view.data.max_length or None,
        "batch_size": train.batch_size,
        "max_steps": train.steps,
        "seed": saved.extra.get("seed"),
        "grad_norm_clip": MAX_GRADIENT_NORM,
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {
            "lr": train.rate_for(member.candidate.plan.methods[0]),
            "weight_decay": train.weight_decay,
        },
    }
    return {name: value for name, value in known.items() if value is not None}


def _score(
    member: Member, saved: SavedPlan, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the suite's metrics of the training whose adapter was saved, and what it lacks.

    The suite's forgetting is another quantity: the loss at each token's own place, on rows of
    Wikipedia (peft, `method_comparison/MetaMathQA/run.py`, `calculate_mean_per_token_loss`).
    """
    train, seed = member.candidate.train, saved.extra.get("seed")
    mine = next((line for line in member.entry.seeds if line.seed == seed), None)
    test = mine.test if mine else {}
    lines = ["the rate falls linearly after a warm-up; the suite's schedules are cosine and none"]
    if "accuracy" not in test:
        names = ", ".join(sorted(test)) or "nothing"
        lines.append(f"the suite's test accuracy is null: {names} was measured")
    line = "the suite's forgetting is null: it is measured on its own rows, in another way"
    if mine and (found := mine.further.get("forgetting")) is not None:
        line += f"; that of {settings.get('retain')} is {found:+.4f}"
    lines.append(line)
    score = {
        "step": train.steps,
        "test accuracy": test.get("accuracy"),
        "train loss": None,
        "train samples": train.steps * train.batch_size,
        "train total tokens": None,
        "forgetting": None,
    }
    return score, lines


def _null_lines(row: Mapping[str, Any]) -> list[str]:
    """Return which of a training's columns are null, but for those of other lines."""
    run, train = row["run_info"], row["train_info"]
    parameters = _nulls(run["train_config"])
    unknown = [*_nulls(run), *_nulls(train), *_nulls(train["metrics"][-1])]
    measured = [name for name in unknown if name not in _OTHER_LINES]
    return [
        f"not measured, so null: {', '.join(measured)}; also commits and the machine",
        f"the suite takes its default of {', '.join(parameters)}; they are null in the result",
    ]


def _nulls(row: Mapping[str, Any]) -> list[str]:
    return [name for name, value in row.items() if value is None]


def _data_name(settings: Mapping[str, Any]) -> str:
    data = settings.get("data")
    return Path(data).stem if isinstance(data, str) else json.dumps(data)


def _packages(versions: Mapping[str, str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        found |= {f"{name}-version": versions.get(name), f"{name}-commit-hash": None}
    return found
