"""What the user asked for: one frozen dataclass; its field notes are the command line's help."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from autopeft.costs.objectives import COSTS
from autopeft.errors import SettingsError


def _note(text: str, default: Any = None, group: str = "Search") -> Any:
    return field(default=default, metadata={"help": text, "group": group})


@dataclass(frozen=True)
class SearchSettings:
    """Everything `autopeft search` can be told. YAML keys, flags and keywords share these names."""

    model: str = _note("Folder or hub id of the pretrained model.", "", "Model and data")
    data: str = _note("CSV, JSONL or Parquet file, or hub id of a data set.", "", "Model and data")
    task: str = _note("text-classification or causal-lm.", "text-classification", "Model and data")
    text: str = _note("Column with the text.", "text", "Model and data")
    text_pair: str | None = _note("Column with the second text of a pair.", None, "Model and data")
    label: str = _note("Column with the label.", "label", "Model and data")
    prompt: str = _note(
        "Column with the prompt (causal-lm); no loss on it.", "prompt", "Model and data"
    )
    completion: str = _note(
        "Column with the completion (causal-lm).", "completion", "Model and data"
    )
    validation: str | None = _note(
        "File or split name to validate on; else split off the training data.",
        None,
        "Model and data",
    )
    test: str | None = _note(
        "File or split name to test on; else split off the training data.", None, "Model and data"
    )
    data_name: str | None = _note("Subset name of a hub data set.", None, "Model and data")
    model_revision: str | None = _note("Revision of a hub model.", None, "Model and data")
    data_revision: str | None = _note("Revision of a hub data set.", None, "Model and data")
    role_map: Mapping[str, Any] | None = _note(
        "Where adapters can go in a model whose modules are not recognized: role=path pairs, such "
        "as blocks=encoder.stages,attn.q=mix.query.",
        None,
        "Model and data",
    )
    max_length: int = _note("Longest row, in tokens; longer ones are cut.", 128, "Model and data")
    max_train_rows: int | None = _note("Use at most so many training rows.", None, "Model and data")
    max_validation_rows: int | None = _note(
        "Validate on at most so many rows.", 1000, "Model and data"
    )
    max_test_rows: int | None = _note("Test on at most so many rows.", None, "Model and data")

    space: str | Mapping[str, Any] = _note("Name or file of a search space.", "default", "Search")
    metric: str | None = _note("Quality to search for; default: the task's own.", None, "Search")
    objectives: tuple[str, ...] = _note(
        "Costs to trade against quality: trainable_params, adapter_bytes, train_flops, "
        "peak_memory_bytes, train_seconds, latency_ms.",
        ("trainable_params",),
        "Search",
    )
    constraints: tuple[str, ...] = _note(
        "Limits such as trainable_params<=200k (or 0.1%).", (), "Search"
    )
    sampler: str = _note("autopeft, tpe, nsga2, gp or random.", "autopeft", "Search")
    pruner: str = _note(
        "gap, none, median, asha or another Optuna pruner by name.", "gap", "Search"
    )
    warm_start: str | None = _note(
        "Output folder of an earlier search on other data; its outcomes guide this one.",
        None,
        "Search",
    )
    audit_share: float = _note(
        "Share of stopped trials that are trained to the end all the same, to judge the pruner.",
        0.05,
        "Search",
    )
    pick: str = _note(
        "How best is picked: one_se, knee, best_quality, or a limit: trainable_params<=50k.",
        "one_se",
        "Search",
    )
    seed: int = _note("Seeds the search, the splits and the trainings.", 0, "Search")

    budget: str = _note(
        "What may be spent: 30m, 2h, 50trials, 3e15flops, or several.", "30m", "Budget"
    )
    confirm_share: float = _note("Share of the budget kept for confirmation.", 0.3, "Budget")
    confirm_seeds: int = _note("Seeds each finalist is retrained with.", 3, "Budget")
    max_finalists: int = _note("Front members to confirm, at most.", 6, "Budget")
    compress: bool = _note(
        "Score confirmed LoRAs cut to lower ranks too, where time is left.", True, "Budget"
    )

    steps: int = _note("Optimizer steps of a full trial.", 100, "Training")
    batch_size: int = _note("Rows per optimizer step.", 16, "Training")
    eta: int = _note("Ratio between rungs.", 3, "Training")
    rungs: int = _note("How many times a trial reports, the end included.", 3, "Training")
    rung_rows: int | None = _note(
        "Validation rows looked at before the last rung; the end sees all.", 256, "Training"
    )
    prefix_cache: bool = _note(
        "Compute the frozen blocks below the lowest adapter once and reuse them.", True, "Training"
    )
    prefix_cache_gb: float = _note("Size limit of that cache, a machine.", 2.0, "Training")
    precision: str = _note("auto, fp32 or bf16.", "auto", "Training")
    quantization: str = _note(
        "How the frozen weights are stored: none, bnb-4bit, bnb-8bit or torchao-int8 (needs "
        "autopeft[quant]).",
        "none",
        "Training",
    )

    workers: int | None = _note("Parallel trials; default: one a core or GPU.", None, "Machine")
    gpus_per_worker: float | None = _note("GPU share of a worker, e.g. 0.25.", None, "Machine")
    pack: int | None = _note(
        "Candidates a worker trains in one batched forward; default: 1 on a CPU, up to 4 on a GPU "
        "where a measurement says that it pays.",
        None,
        "Machine",
    )
    ray_address: str | None = _note("Address of a Ray cluster to join.", None, "Machine")

    output: str = _note("Folder for the results; must not hold another search.", "", "Output")
    storage: str | None = _note(
        "Optuna storage: a URL, or a path ending in .log for a journal file; "
        "default: study.db in the output folder.",
        None,
        "Output",
    )
    study_name: str | None = _note(
        "Name in the storage; default: the output folder's.", None, "Output"
    )

    @classmethod
    def from_mapping(cls, row: Mapping[str, Any]) -> SearchSettings:
        """Settings from YAML keys or keywords.

        Raises:
            SettingsError: if a key is unknown.
        """
        known = [f.name for f in fields(cls)]
        for key in row:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
                raise SettingsError(key, row[key], "no such setting", remedy)
        values = {key: _plain(key, value) for key, value in row.items()}
        return cls(**{key: value for key, value in values.items() if value is not None})

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, as `from_mapping` takes them."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    def __post_init__(self) -> None:
        for name, minimum in _MINIMA.items():
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise SettingsError(
                    name, value, f"`{name} >= {minimum}` must hold", f"use {minimum} or more"
                )
        if not 0.0 <= self.confirm_share <= 0.9:
            raise SettingsError(
                "confirm_share", self.confirm_share, "a share from 0 to 0.9", "use e.g. 0.3"
            )
        if not 0.0 <= self.audit_share <= 1.0:
            raise SettingsError(
                "audit_share", self.audit_share, "a share from 0 to 1", "use e.g. 0.05"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise SettingsError(
                    name, getattr(self, name), "no such choice", f"use one of {', '.join(choices)}"
                )
        for name in self.objectives:
            if name not in COSTS:
                raise SettingsError(
                    "objectives", name, "no such cost", f"use any of {', '.join(COSTS)}"
                )
        for role, path in (self.role_map or {}).items():
            paths = [path] if isinstance(path, str) else path
            if not isinstance(paths, list | tuple) or not all(isinstance(p, str) for p in paths):
                raise SettingsError(
                    "role_map", {role: path}, "must give paths inside a block", "use e.g. mix.query"
                )
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise SettingsError(
                "objectives",
                list(self.objectives),
                "name at least one cost, each once",
                "use e.g. trainable_params",
            )


_MINIMA: Mapping[str, float] = {
    "max_length": 2,
    "max_train_rows": 1,
    "max_validation_rows": 1,
    "max_test_rows": 1,
    "confirm_seeds": 1,
    "max_finalists": 1,
    "steps": 1,
    "batch_size": 1,
    "eta": 2,
    "rungs": 1,
    "rung_rows": 1,
    "prefix_cache_gb": 0,
    "workers": 1,
    "pack": 1,
    "gpus_per_worker": 0,
    "seed": 0,
}

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "task": ("text-classification", "causal-lm"),
    "precision": ("auto", "fp32", "bf16"),
    "quantization": ("none", "bnb-4bit", "bnb-8bit", "torchao-int8"),
    "sampler": ("autopeft", "tpe", "nsga2", "gp", "random"),
}

_KINDS: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "float": (int, float),
    "Mapping[str, Any]": (Mapping,),
    "tuple[str, ...]": (tuple,),
    "None": (type(None),),
}


def _plain(key: str, value: Any) -> Any:
    """The value as its field keeps it, or an error if it is of the wrong kind."""
    annotation = str(next(f for f in fields(SearchSettings) if f.name == key).type)
    names = [name.strip() for name in annotation.split("|")]
    if "tuple[str, ...]" in names:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list | tuple) and all(isinstance(item, str) for item in items):
            return tuple(part.strip() for item in items for part in item.split(",") if part.strip())
    if key == "role_map" and isinstance(value, str):
        return _pairs(key, value)
    if key == "budget" and isinstance(value, list):
        return ",".join(str(item) for item in value)
    kinds = tuple(kind for name in names for kind in _KINDS[name])
    if value is None or (isinstance(value, kinds) and isinstance(value, bool) == ("bool" in names)):
        if "float" in names and isinstance(value, int):
            return float(value)
        return value
    wanted = " or ".join(_WORDS.get(name, name) for name in names if name != "None")
    raise SettingsError(key, value, f"must be {wanted}", "correct it")


def _pairs(key: str, text: str) -> dict[str, str]:
    """The mapping that a flag writes as `a=b,c=d`."""
    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    for left, equals, right in pairs:
        if not (left.strip() and equals and right.strip()):
            raise SettingsError(key, text, "must be role=path pairs", "write e.g. attn.q=mix.query")
    return {left.strip(): right.strip() for left, _, right in pairs}


_WORDS = {
    "str": "text",
    "int": "a whole number",
    "bool": "true or false",
    "float": "a number",
    "Mapping[str, Any]": "a mapping",
    "tuple[str, ...]": "a list of names",
}


RESUMABLE = frozenset(
    {
        "budget",
        "confirm_share",
        "confirm_seeds",
        "max_finalists",
        "workers",
        "gpus_per_worker",
        "pack",
        "ray_address",
        "pick",
    }
)
"""Settings that may change when a search is resumed: none that define what is searched."""
