"""SearchSettings: every setting of a search, with the help text that the command line shows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from autopeft.costs.constraints import check_no_comma
from autopeft.costs.objectives import COSTS, quality_beside
from autopeft.errors import SettingsError
from autopeft.plan import TrainSettings
from autopeft.serving.servers import SERVERS
from autopeft.utils.databases import is_in_memory
from autopeft.utils.formatting import middle_cut
from autopeft.utils.serialize import finite, from_plain, to_plain
from autopeft.utils.text_files import NamedTwice, unlike_names
from autopeft.utils.yaml_files import parse_yaml

AUTO = "auto"
"""The value of a setting that leaves it to autopeft."""

Source = str | tuple[str, ...]
"""A file, a pattern, a folder or a hub id; or several files."""


def _setting(default: Any, help: str, *, resumable: bool = False, **limits: Any) -> Any:
    """Declare a setting within the `limits` of `_check`; a resumable one may change on resume."""
    metadata = {"help": help, "resumable": resumable, "limits": limits}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SearchSettings:
    """Every setting of a search; YAML keys, flags and keyword arguments share these names.

    Example:
        >>> settings = SearchSettings(model="gpt2", data="train.csv", budget="2h")
        >>> SearchSettings.from_mapping(settings.to_mapping()) == settings
        True
    """

    # Model and data
    model: str = _setting("", "Pretrained model: a folder or a hub id.")
    data: str | tuple[str, ...] = _setting(
        "",
        "Training data: a file (CSV, TSV, JSON, JSONL, Parquet, Arrow, CoNLL or text, perhaps "
        "compressed), a list of files, a pattern such as 'data/*.jsonl', a folder, or the hub id "
        "of a dataset.",
    )
    task: str | None = _setting(
        None, "Kind of problem. By default, it is recognized from the data's columns."
    )
    text: str | None = _setting(None, "Column with the text. By default, it is recognized.")
    text_pair: str | None = _setting(
        None, "Column with the second text, to classify pairs of texts."
    )
    label: str | None = _setting(None, "Column with the label. By default, it is recognized.")
    prompt: str | None = _setting(None, "Column with the prompt of a completion; it adds no loss.")
    completion: str | None = _setting(None, "Column with the completion to learn.")
    task_options: Mapping[str, Any] | None = _setting(
        None,
        "Options of the task, name=value pairs such as loss=ipo,beta=0.05; see `autopeft tasks`.",
    )
    columns: Mapping[str, str] | None = _setting(
        None,
        "Further columns of a task, role=column pairs such as chosen=better,rejected=worse; see "
        "`autopeft tasks`. By default, they are recognized.",
    )
    validation: str | tuple[str, ...] | None = _setting(
        None,
        "Validation data, as `data`, or a split of it. By default, rows are split off the training "
        "data.",
    )
    test: str | tuple[str, ...] | None = _setting(
        None,
        "Test data, as `data`, or a split of it. By default, rows are split off the training data.",
    )
    data_name: str | None = _setting(None, "Configuration of the hub dataset, such as sst2.")
    model_revision: str | None = _setting(
        None, "Revision of the hub model: a branch, tag or commit."
    )
    data_revision: str | None = _setting(
        None, "Revision of the hub dataset: a branch, tag or commit."
    )
    role_map: Mapping[str, str | Sequence[str]] | None = _setting(
        None,
        "Where adapters can go, for a model whose modules are not recognized: role=path pairs "
        "such as blocks=encoder.stages,attn.q=mix.query.",
    )
    max_length: int | None = _setting(
        None,
        "Maximum length of a row in tokens; longer rows are cut. By default, the rows' lengths "
        "decide.",
        minimum=2,
    )
    on_long: str = _setting(
        "cut",
        "What becomes of longer rows: cut (chats keep system prompt and last answer, prompts lose "
        "their beginning), or drop.",
        choices=("cut", "drop"),
    )
    max_train_rows: int | None = _setting(
        None, "Maximum number of training rows. By default, all are used.", minimum=1
    )
    max_validation_rows: int | None = _setting(
        1000, "Maximum number of validation rows.", minimum=1
    )
    max_test_rows: int | None = _setting(
        None, "Maximum number of test rows. By default, all are used.", minimum=1
    )

    max_data_gb: float = _setting(
        8.0,
        "Largest data file that is read, after decompression, GiB. It protects from archives made "
        "to fill a disk.",
        minimum=0,
    )

    retain: str | None = _setting(
        None,
        "What the model should not forget: a text file, rows of a task, or a hub dataset such as "
        "wikitext. The loss on it, minus that of the bare base model, is `forgetting`.",
    )
    retain_rows: int = _setting(
        32, "Windows of `max_length` tokens, or rows, of `retain` that are scored.", minimum=1
    )
    also: tuple[str | Mapping[str, Any], ...] = _setting(
        (),
        "Settings files of further tasks on which what is trained is scored too: data, task, "
        "columns and metric of each. The metric of squad.yaml is the quality squad.METRIC.",
    )

    # Search
    space: str | Mapping[str, Any] | None = _setting(
        None,
        "Search space: a name (see `autopeft spaces`), a YAML file, or YAML in braces. By default, "
        "the task's own.",
    )
    metric: str | None = _setting(
        None,
        "Quality to optimize: a metric of the task, a scorer of scikit-learn, or a function of "
        "yours as package.module:name. By default, the task's own metric.",
    )
    evaluate: str | None = _setting(
        None,
        "A function that trains a candidate and returns its metrics, as package.module:name, in "
        "place of data and task; see the guide on your own training loop.",
    )
    direction: str | None = _setting(
        None,
        "Direction of the metric that `evaluate` returns: maximize or minimize. By default, its "
        "name tells.",
        choices=("maximize", "minimize"),
    )
    generation_rows: int = _setting(
        200, "Rows of a split for which text is generated, if the metric needs it.", minimum=4
    )
    objectives: tuple[str, ...] = _setting(
        ("trainable_params",),
        f"Costs to minimize beside the quality, one or more of {', '.join(COSTS.registered)}, or "
        "a registered one; beside a cost also forgetting (see retain) and metrics of further tasks "
        "such as squad.f1 (see also). tokens_per_second is maximized, beside another cost.",
    )
    constraints: tuple[str, ...] = _setting(
        (),
        "Limits on the costs, such as trainable_params<=200k or trainable_params<=0.1%. "
        "Candidates over a limit are not trained. Also limits on what is only measured: "
        "serving_latency_ms<=50, tokens_per_second>=20, with retain forgetting<=0.05, and with "
        "also squad.f1>=0.6: trials that break one are not on the front.",
    )
    servable: str | None = _setting(
        None,
        f"Draw only plans that can be exported for a server with nothing lost: "
        f"{', '.join(SERVERS)}.",
        choices=tuple(SERVERS),
    )
    serving_dtype: str = _setting(
        "bfloat16",
        "Type of the weights with which serving_latency_ms and tokens_per_second are measured.",
        choices=("bfloat16", "float16", "float32"),
    )
    serving_batch_size: int = _setting(1, "Rows with which they are measured.", minimum=1)
    serving_prompt_tokens: int = _setting(
        128, "Tokens of each of these rows; images and sounds are as they are.", minimum=1
    )
    serving_new_tokens: int = _setting(
        32, "Tokens generated for each of these rows, for tokens_per_second.", minimum=3
    )
    sampler: str = _setting(
        "autopeft",
        "How candidates are proposed: autopeft (Bayesian optimization), random, tpe, nsga2 or gp "
        "of Optuna, a registered sampler, or one of Optuna's or yours as package.module:name.",
    )
    pruner: str = _setting(
        "gap",
        "How weak trials are stopped early: gap (compares with trials that cost no more), none, "
        "median, percentile, asha or hyperband of Optuna, a registered pruner, or one of Optuna's "
        "or yours as package.module:name.",
    )
    warm_start: str | None = _setting(
        None, "Output folder of an earlier search on other data; its trials guide this search."
    )
    prior: str | None = _setting(
        None,
        "JSON file of trainings on other models and data, a list of rows by method, roles, rank "
        "and learning rate; they guide this search as far as they agree with its trials.",
    )
    audit_share: float = _setting(
        0.05,
        "Share of the pruned trials that are trained to the end anyway, to measure what pruning "
        "costs.",
        minimum=0,
        maximum=1,
    )
    pick: str = _setting(
        "one_se",
        "How `best` is chosen from the front: one_se (the cheapest within one standard error of "
        "the best), knee, best_quality, or a limit such as trainable_params<=50k or, if it is "
        "measured, serving_latency_ms<=50.",
        resumable=True,
    )
    seed: int = _setting(0, "Random seed of the search, the splits and the trainings.", minimum=0)

    # Budget
    budget: str = _setting(
        "30m",
        "What the search may spend: time (30m, 2h), trials (50trials), training FLOPs "
        "(3e15flops), or several of them separated by commas. The first limit reached ends it.",
        resumable=True,
    )
    confirm_share: float | None = _setting(
        None,
        "Share of the budget reserved for confirming the finalists. By default, it is planned from "
        "the budget and the speed of this machine, as are the next two, steps and rungs.",
        minimum=0,
        maximum=0.9,
        resumable=True,
    )
    confirm_seeds: int | None = _setting(
        None,
        "Seeds with which a finalist is retrained at most; one whose place is clear gets fewer. By "
        "default, planned: 2 or 3, and up to two more where they may settle the verdict.",
        minimum=1,
        maximum=1000,
        resumable=True,
    )
    max_finalists: int | None = _setting(
        None,
        "Maximum number of front members to confirm. By default, planned: 2 to 6.",
        minimum=1,
        maximum=1000,
        resumable=True,
    )
    compress: bool = _setting(
        True, "Also score the confirmed LoRAs cut to fewer parameters, if time is left."
    )

    # Training
    steps: int | None = _setting(
        None,
        "Optimizer steps of a full trial. By default, planned: as many as leave enough trials.",
        minimum=1,
    )
    batch_size: int | None = _setting(
        None,
        "Rows per optimizer step. By default, planned: 16, or fewer where else too few trials fit "
        "into the budget.",
        minimum=1,
    )
    eta: int = _setting(3, "Ratio of training steps between one rung and the next.", minimum=2)
    rungs: int | None = _setting(
        None,
        "Number of rungs: how often a trial is evaluated, the end included. By default, 3.",
        minimum=1,
        maximum=100,
    )
    rung_rows: int | None = _setting(
        None,
        "Validation rows evaluated at a rung; the last rung evaluates all rows. By default, "
        "planned: 64 to 256.",
        minimum=1,
    )
    activation_cache: bool = _setting(
        True,
        "Cache the activations of the frozen blocks below the lowest adapter, to compute them "
        "only once.",
    )
    activation_cache_gb: float = _setting(
        2.0, "Size limit of this cache per machine, GiB.", minimum=0
    )
    gradient_checkpointing: bool | str = _setting(
        "auto",
        "Keep only the inputs of the blocks at and above the lowest adapter, and compute the rest "
        "again in the backward pass: a third more time, far less memory. true, false, or auto: "
        "where the first LoRAs fit into memory in no other way.",
        choices=(True, False, "auto"),
    )
    torch_compile: bool | str = _setting(
        False,
        "Compile the blocks at and above the lowest adapter with torch.compile. true, false, or "
        "auto: a worker measures it, and compiles where that takes less time in all.",
        choices=(True, False, "auto"),
    )
    micro_batch_tokens: int | None = _setting(
        None,
        "Tokens of a forward pass at most, padding included. A step with more accumulates the "
        "gradients of micro-batches; the result is the same. By default, a step is one pass.",
        minimum=1,
    )
    packing: bool = _setting(
        False,
        "Put the rows of a step one after another into long sequences, each row attending to "
        "itself alone: less padding, the same result. For sft.",
    )
    attn_implementation: str = _setting(
        "auto",
        "Implementation of attention, as in transformers: eager, sdpa, flash_attention_2 or "
        "flash_attention_3; auto leaves the choice to transformers.",
        choices=("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"),
    )
    optimizer: str = _setting(
        "adamw",
        "Optimizer of the adapters: adamw, or bitsandbytes' with moments in 8 bits, adamw_8bit or "
        "paged_adamw_8bit; needs `pip install autopeft[quant]`.",
        choices=("adamw", "adamw_8bit", "paged_adamw_8bit"),
    )
    precision: str = _setting(
        "auto", "Precision of the trainings: auto, fp32 or bf16.", choices=("auto", "fp32", "bf16")
    )
    quantization: str = _setting(
        "none",
        "Quantization of the frozen weights: none, bnb-4bit, bnb-8bit or torchao-int8; needs "
        "`pip install autopeft[quant]`.",
        choices=("none", "bnb-4bit", "bnb-8bit", "torchao-int8"),
    )

    # Machine
    backend: str = _setting(
        "ray",
        "What runs the trials: ray, local, which runs one at a time in this process, or one of "
        "yours as package.module:name.",
        resumable=True,
    )
    workers: int | None = _setting(
        None,
        "Number of trials in parallel. By default, one per CPU core or GPU.",
        minimum=1,
        resumable=True,
    )
    gpus_per_worker: float | None = _setting(
        None,
        "GPUs per worker; 0.25 lets four workers share a GPU, 2 spreads the blocks of a large "
        "model over two.",
        minimum=0,
        resumable=True,
    )
    trials_per_worker: int | None = _setting(
        None,
        "Number of adapters that a worker trains at once on one base model. By default, 1 on a "
        "CPU and up to 4 on a GPU, if a measurement shows that it is faster.",
        minimum=1,
        maximum=1000,
        resumable=True,
    )
    hang_seconds: float | None = _setting(
        None,
        "Seconds that a worker may sleep without progress; then it is replaced, and its trial "
        "fails. 20 times the longest pause so far is allowed in any case. By default, a quarter of "
        "the budget, from 20 to 300.",
        minimum=1,
        resumable=True,
    )
    ray_address: str | None = _setting(
        None, "Address of a Ray cluster to run on. By default, this machine.", resumable=True
    )

    # Output
    output: str = _setting(
        "", "Folder for the results, or a URL such as s3://bucket/run; must be empty or not exist."
    )
    storage: str | None = _setting(
        None,
        "Optuna storage: a database URL, grpc://host:port of Optuna's storage proxy, or a path "
        "ending in .log for a journal file. By default, study.db in the output folder.",
    )
    study_name: str | None = _setting(
        None, "Name of the Optuna study. By default, the name of the output folder."
    )
    join: bool = _setting(
        False,
        "Share the study with other searches: begin it in `storage` under `study_name`, or join it "
        "where it is there. No candidate is trained twice.",
    )
    report_to: tuple[str, ...] = _setting(
        (),
        "Trackers that the search reports to: mlflow, wandb, trackio, tensorboard, or the name or "
        "package.module:name of another. By default, none.",
        resumable=True,
    )

    @classmethod
    def from_mapping(cls, row: Mapping[str, Any]) -> SearchSettings:
        """Return the settings in a YAML file's or a call's mapping; None stands for the default.

        Raises:
            SettingsError: if a key is unknown, or a value is of the wrong type or out of range.
        """
        known = {each.name for each in fields(cls)}
        for key in row:
            if key in RENAMED and key not in known:
                raise SettingsError(key, row[key], "was renamed", f"use {RENAMED[key]}")
        given = {
            key: _parse_flag(key, value)
            for key, value in row.items()
            if value is not None or key not in known
        }
        return from_plain(cls, given, remedy="see `autopeft search --help`")

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values, as `from_mapping` takes them."""
        values: dict[str, Any] = finite(to_plain(self))
        return values

    def check_sources(self, *, needs_data: bool = True) -> None:
        """Refuse settings without a model, without data to train on, or with a study in memory.

        Raises:
            SettingsError: naming the setting.
        """
        if self.storage is not None and is_in_memory(self.storage):
            problem = "is a database in memory: the study would be lost at the end"
            raise SettingsError("storage", self.storage, problem, "leave it out, or name a file")
        needs_data = needs_data and not self.evaluate
        for name in ("model", "data") if needs_data else ("model",):
            if not getattr(self, name):
                raise SettingsError(name, "", "is missing", f"give --{name}")

    @property
    def rows_per_step(self) -> int:
        """Rows per optimizer step; the usual ones where they are still to be planned."""
        return self.batch_size or TrainSettings.batch_size

    @property
    def devices_per_worker(self) -> int:
        """Accelerators that a worker's model is spread over; 1 with a part of one, or with none."""
        return max(1, int(self.gpus_per_worker or 0))

    @property
    def trains_alone(self) -> str:
        """The setting with which a worker trains one adapter at a time; "" if there is none."""
        names = ("gradient_checkpointing", "torch_compile", "micro_batch_tokens", "packing")
        return next((name for name in names if getattr(self, name) not in (None, False, AUTO)), "")

    def column_names(self) -> dict[str, str]:
        """Return role -> column for every column that the settings name."""
        named = {role: getattr(self, role) for role in _COLUMNS}
        return {**{k: v for k, v in named.items() if v is not None}, **(self.columns or {})}

    def __post_init__(self) -> None:
        for each in fields(self):
            _check(each.name, getattr(self, each.name), **each.metadata["limits"])
        gpus = self.gpus_per_worker or 0.0
        if gpus > 1.0 and not float(gpus).is_integer():
            problem = "a worker has a part of one GPU, or whole ones"
            raise SettingsError("gpus_per_worker", gpus, problem, f"use {int(gpus)}")
        for role in _COLUMNS:
            own, other = getattr(self, role), (self.columns or {}).get(role)
            if own is not None and other not in (None, own):
                problem = f"columns names {other!r} for the same role"
                raise SettingsError(role, own, problem, f"leave out {role}, or columns.{role}")
        for name, allowed in _LOCAL.items() if self.backend == "local" else ():
            value = getattr(self, name)
            if not allowed(value):
                problem = "backend=local runs one worker in this process"
                raise SettingsError(name, value, problem, f"leave {name} out, or use backend=ray")
        if self.trains_alone and (self.trials_per_worker or 1) > 1:
            problem = f"with {self.trains_alone}, adapters are trained one at a time"
            raise SettingsError(
                "trials_per_worker", self.trials_per_worker, problem, "leave it out"
            )
        if self.objectives and all(map(quality_beside, self.objectives)):
            problem = "must name a cost beside the qualities"
            remedy = f"add one, e.g. trainable_params,{','.join(self.objectives)}"
            raise SettingsError("objectives", list(self.objectives), problem, remedy)
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            problem = "must name at least one cost, each once"
            raise SettingsError(
                "objectives", list(self.objectives), problem, "use e.g. trainable_params"
            )


def _check(
    name: str,
    value: Any,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str | bool] = (),
) -> None:
    """Raise a SettingsError if a value is not within the limits of its setting."""
    if choices and value is not None and value not in choices:
        known = ", ".join(str(each).lower() for each in choices)
        raise SettingsError(name, value, "unknown choice", f"use one of {known}")
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str):
            _check_text(name, text)
    if minimum is None or value is None:
        return
    if maximum is not None and maximum <= 1 and not minimum <= value <= maximum:
        raise SettingsError(
            name, value, f"must be a share from {minimum} to {maximum}", "correct it"
        )
    if not value >= minimum:
        problem = f"`{name} >= {minimum}` must hold"
        raise SettingsError(name, value, problem, f"use {minimum} or more")
    most = _MOST if maximum is None else maximum
    if value > most:
        raise SettingsError(name, value, f"`{name} <= {most}` must hold", f"use {most} or less")


_MOST = 2**31 - 1
"""Largest number where a setting names no other; random generators take no larger seed."""

_NO_NAMES = ("space", "storage", "budget", "pick", "constraints")
"""Settings whose text is no name and no path: its parts may be longer than those."""


def _check_text(name: str, value: str) -> None:
    """Raise a SettingsError for text that the file system and encoders cannot take."""
    if "\x00" in value:
        raise SettingsError(name, value, "holds a NUL character", "remove it")
    try:
        longest = max(len(part.encode()) for part in value.split("/"))
    except UnicodeEncodeError:
        problem = "holds half a character (a lone surrogate)"
        raise SettingsError(name, value, problem, "write it in UTF-8") from None
    if len(value) > 4000 or (longest > 255 and name not in _NO_NAMES):
        shown = middle_cut(value, 60)
        raise SettingsError(name, shown, "is longer than any name or path", "shorten it")


_LOCAL: Mapping[str, Callable[[Any], bool]] = {
    "workers": lambda value: value in (None, 1),
    "gpus_per_worker": lambda value: value is None or float(value).is_integer(),
    "ray_address": lambda value: value is None,
}
"""Setting -> whether it may have a value with the local backend."""

RENAMED = {
    "pack": "trials_per_worker",
    "prefix_cache": "activation_cache",
    "prefix_cache_gb": "activation_cache_gb",
}
"""Former name of a setting -> its name now."""

_COLUMNS = ("text", "text_pair", "label", "prompt", "completion")
"""Roles of columns that have a setting of their own."""

FORMER_DEFAULTS = {name: name for name in ("text", "label", "prompt", "completion")}
"""Columns that an earlier version wrote into every settings file, of use or not."""

_PAIRS = {
    "role_map": "attn.q=mix.query",
    "columns": "text=review",
    "task_options": "loss=ipo,beta=0.05",
}
"""Setting that is a mapping -> an example of how a flag writes it."""

_SWITCHES = ("gradient_checkpointing", "torch_compile")
"""Settings that are true, false or something else."""

_LISTS = ("objectives", "constraints", "report_to")
"""Settings that may be written as one text with commas."""

_ALONE = ("also",)
"""Settings that are a list, of which one may be written alone."""


def _parse_flag(key: str, value: Any) -> Any:
    """Return what a flag's text stands for where a setting is a list or a mapping."""
    if key in _ALONE and isinstance(value, str | os.PathLike | Mapping):
        value = [value]
    if key in _ALONE and isinstance(value, list | tuple):
        return [os.fspath(item) if isinstance(item, os.PathLike) else item for item in value]
    if key in _LISTS and isinstance(value, str):
        value = [value]
    if key in _LISTS and isinstance(value, list | tuple):
        for item in value if key == "constraints" else ():
            if isinstance(item, str):
                check_no_comma(item)
        texts = [item.split(",") if isinstance(item, str) else [item] for item in value]
        parts = [part.strip() if isinstance(part, str) else part for text in texts for part in text]
        return [part for part in parts if part != ""]
    if key in _SWITCHES and isinstance(value, str):
        return {"true": True, "false": False}.get(value, value)
    if key in _PAIRS and isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        if not all(left.strip() and right.strip() for left, _, right in pairs):
            raise SettingsError(key, value, "must be name=value pairs", f"use e.g. {_PAIRS[key]}")
        try:
            named = unlike_names((left.strip(), right.strip()) for left, _, right in pairs)
        except NamedTwice as wrong:
            raise SettingsError(key, value, str(wrong), "name it once") from None
        return {k: _number_or_text(v) for k, v in named.items()} if key == "task_options" else named
    if key == "space" and isinstance(value, str) and value.lstrip().startswith("{"):
        remedy = "use e.g. {methods: [lora], layers: last:4}"
        return parse_yaml(value, field=key, shown=value, remedy=remedy, error=SettingsError)
    if key == "budget" and isinstance(value, list):
        return ",".join(map(str, value))
    return value


def _number_or_text(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


RESUMABLE = frozenset(each.name for each in fields(SearchSettings) if each.metadata["resumable"])
"""Settings that may change when a search is resumed: none of them defines what is searched."""
