"""Rows of a prior from the result files of peft's `method_comparison`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from autopeft.errors import DataError, StorageError, UserError
from autopeft.methods import LINEAR_ROLES, Method, all_methods
from autopeft.models.layout import roles_of_name
from autopeft.models.peft_plan import fitting_methods
from autopeft.searcher.samplers.prior import PriorRow, read_prior
from autopeft.utils.arguments import checked_path, checked_target
from autopeft.utils.files import write_text
from autopeft.utils.formatting import counted
from autopeft.utils.quiet import quiet_peft
from autopeft.utils.serialize import from_plain, read_json, strict_json
from autopeft.utils.text_files import MAX_JSON_BYTES, Unreadable, parse_json, read_text

SUCCESS, FAILED = "success", "failed"
"""What the suite says of a training that ended, and of one that did not."""

_ALL_LINEAR = "all-linear"
"""peft's word for all linear modules of the blocks."""

_REMEDY = "give a result file as peft's method_comparison writes it"


@dataclass(frozen=True)
class TrainConfig:
    """What is read of a result's training; the suite has more."""

    model_id: str
    optimizer_type: str | None = "AdamW"
    optimizer_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunInfo:
    """What is read of `run_info`."""

    train_config: TrainConfig
    peft_config: Mapping[str, Any] | None


@dataclass(frozen=True)
class TrainInfo:
    """What is read of `train_info`; the last of the metrics is that of the test split."""

    status: str
    metrics: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class MetaInfo:
    """What is read of `meta_info`."""

    dataset_info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ResultFile:
    """What is read of a result file."""

    run_info: RunInfo
    train_info: TrainInfo
    meta_info: MetaInfo = field(default_factory=MetaInfo)


@dataclass(frozen=True)
class Added:
    """What was added to a prior.

    Attributes:
        path: The file.
        n_new: Rows that were added.
        n_known: Rows that it held already.
        n_total: Rows that it holds now.
        left_out: Reason -> result files that gave no row.
        n_without_rate: Of the new rows, those without a learning rate.
    """

    path: Path
    n_new: int
    n_known: int
    n_total: int
    left_out: Mapping[str, int]
    n_without_rate: int

    def lines(self) -> list[str]:
        """Return it in words, one line each."""
        lines = [f"{counted(self.n_new, 'row')} added, {self.n_known:,} were known"]
        lines += [f"{counted(n, 'file')} left out: {why}" for why, n in self.left_out.items()]
        if self.n_without_rate:
            n = counted(self.n_without_rate, "row")
            lines.append(f"{n} without a learning rate: the middle of the method's range is taken")
        return [*lines, f"written: {self.path}, {counted(self.n_total, 'row')}"]


class _LeftOut(Exception):
    """A result that is no row of a prior; the text says why."""


def add_to_prior(paths: Sequence[str | Path], to: str | Path) -> Added:
    """Add result files to a prior, which is made if it does not exist.

    Args:
        paths: Result files, or folders of them.
        to: The prior, as the setting `prior` takes it.

    Raises:
        DataError: if a path does not exist or holds no result file, or one is damaged.
        SettingsError: if the prior is damaged.
        StorageError: if nothing can be added.
    """
    target = checked_target("to", to)
    files = _files([checked_path("results", path, error=DataError) for path in paths])
    known = read_prior(target) if target.exists() else ()
    rows: list[PriorRow] = []
    left_out: Counter[str] = Counter()
    for file in files:
        try:
            rows.append(_row_in(file))
        except _LeftOut as why:
            left_out[str(why)] += 1
    fresh = [row for row in dict.fromkeys(rows) if row not in known]
    if not rows:
        reasons = "; ".join(f"{counted(n, 'file')}: {why}" for why, n in left_out.items())
        problem = f"no result gives a row of a prior ({reasons})"
        raise StorageError("to", str(to), problem, "give results of methods that autopeft has")
    total = [*known, *fresh]
    write_text(target, strict_json(total))
    n_unknown = sum(row.learning_rate is None for row in fresh)
    return Added(target, len(fresh), len(rows) - len(fresh), len(total), left_out, n_unknown)


def _files(paths: Sequence[str | Path]) -> list[Path]:
    """Return the result files; in a folder, other JSON files are passed over."""
    found: list[Path] = []
    for path in map(Path, paths):
        place = path.expanduser()
        if place.is_file():
            found.append(place)
            continue
        inside = [file for file in sorted(place.rglob("*.json")) if _is_result(file)]
        if not inside:
            problem = "holds no result file" if place.is_dir() else "no such file or folder"
            remedy = "name JSON files with run_info and train_info, as peft's suite writes them"
            raise DataError("prior", str(path), problem, remedy)
        found += inside
    if not found:
        raise DataError("prior", "", "no result is named", "name files or folders of results")
    return found


def _is_result(file: Path) -> bool:
    """Return whether a file is a result, or may have been one; reading it tells the damage."""
    try:
        content = parse_json(read_text(file, max_bytes=MAX_JSON_BYTES))
    except Unreadable:
        return True
    return isinstance(content, dict) and {"run_info", "train_info"} <= set(content)


def _row_in(file: Path) -> PriorRow:
    content = read_json(file, dict[str, Any], field="prior", remedy=_REMEDY, error=DataError)
    try:
        return row_of(from_plain(ResultFile, content, field="content", allow_unknown=True))
    except UserError as error:
        raise DataError("prior", str(file), error.mistake, _REMEDY) from None


def row_of(result: ResultFile) -> PriorRow:
    """Return a result as a row of a prior.

    Raises:
        UserError: if one of its values is none that a training can have.
    """
    train, run = result.run_info.train_config, result.run_info
    if run.peft_config is None:
        raise _LeftOut("full fine-tuning")
    if result.train_info.status not in (SUCCESS, FAILED):
        raise _LeftOut(f"its status is {result.train_info.status}")
    if train.optimizer_type not in (None, "AdamW"):
        raise _LeftOut(f"trained with {train.optimizer_type}")
    config = _config(run.peft_config)
    method = next(fitting_methods(config), None)
    if method is None:
        raise _LeftOut(f"{config.peft_type.value} as it is set up is no method of autopeft")
    if any(getattr(config, pattern, None) for _, pattern in method.rank_patterns):
        raise _LeftOut("its modules have unlike ranks")
    if getattr(config, "layers_to_transform", None) is not None:
        raise _LeftOut("it adapts some blocks of a number that is unknown")
    if getattr(config, "exclude_modules", None):
        raise _LeftOut("it leaves out some of the modules that it names")
    data = "+".join(sorted(result.meta_info.dataset_info)) or "unknown data"
    return PriorRow(
        setting=f"{train.model_id} on {data}",
        method=method.name,
        roles=_roles(config, method),
        rank=_rank(config, method),
        quality=_quality(result.train_info),
        learning_rate=_rate(train.optimizer_kwargs),
    )


def _config(row: Mapping[str, Any]) -> PeftConfig:
    """Return peft's configuration; what this peft does not know of it is passed over.

    peft takes values of any type, so those that are read here are checked.
    """
    kind = row.get("peft_type")
    mine = [method for method in all_methods() if method.peft_type == kind]
    types: dict[str, Any] = {"target_modules": tuple[str, ...] | str | None}
    types |= {method.rank_argument: int for method in mine if method.takes_rank}
    types |= {method.dropout_argument: float for method in mine if method.dropout_argument}
    for name, of_type in types.items():
        if name in row:
            from_plain(of_type, row[name], field=_argument(name))
    try:
        build = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        known = {each.name for each in fields(build) if each.init} - {"peft_type"}
        with quiet_peft():
            return build(**{name: value for name, value in row.items() if name in known})
    except Exception:  # Configurations of other versions raise errors of many types.
        raise _LeftOut(f"peft cannot read its configuration of {kind}") from None


def _roles(config: Any, method: Method) -> tuple[str, ...]:
    """Return the roles that a configuration adapts; those without linear modules are the method's.

    Names that several architectures use for different modules say nothing.
    """
    if not set(method.roles) & set(LINEAR_ROLES):
        return method.roles[:1]
    targets = config.target_modules
    if targets == _ALL_LINEAR:
        return ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.gate", "mlp.down")
    if not targets or isinstance(targets, str):
        raise _LeftOut("its modules are not listed by name")
    if any(part.isdigit() for target in targets for part in target.split(".")):
        raise _LeftOut("its modules are named block by block, of a number that is unknown")
    named = [roles_of_name(target.rpartition(".")[2]) for target in targets]
    if any(len(roles) != 1 for roles in named):
        raise _LeftOut("its modules have names that are not known, or known for several roles")
    return tuple(sorted({role for (role,) in named}, key=LINEAR_ROLES.index))


def _argument(name: str) -> str:
    return f"content.run_info.peft_config.{name}"


def _rank(config: Any, method: Method) -> int:
    if not method.takes_rank:
        return 0
    name = method.rank_argument
    rank = int(getattr(config, name))
    if rank < 1:
        raise DataError(_argument(name), rank, f"`{name} >= 1` must hold", _REMEDY)
    return rank


def _rate(arguments: Mapping[str, Any]) -> float | None:
    """Return the learning rate; None for one that is not told."""
    field = "content.run_info.train_config.optimizer_kwargs.lr"
    if (value := arguments.get("lr")) is None:
        return None
    rate = from_plain(float, value, field=field)
    if not 0 < rate < math.inf:
        raise DataError(field, rate, "must be finite and above 0", _REMEDY)
    return rate


def _quality(info: TrainInfo) -> float | None:
    """Return the accuracy on the test split; None for a training that failed."""
    if info.status == FAILED:
        return None
    field = "content.train_info.metrics[-1].test accuracy"
    value = info.metrics[-1].get("test accuracy") if info.metrics else None
    if value is None:
        raise _LeftOut("it has no test accuracy")
    accuracy = from_plain(float, value, field=field)
    if not 0 <= accuracy <= 1:
        raise DataError(field, accuracy, "must be a share of rows, from 0 to 1", _REMEDY)
    return accuracy
