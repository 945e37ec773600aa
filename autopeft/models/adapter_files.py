"""Read and write the files of a saved adapter: JSON and safetensors, never a pickle.

A folder holds `plan.json` and the tensors. If one peft configuration covers the plan, the folder is
a standard peft folder (`adapter_config.json`, `adapter_model.safetensors` with a new head among its
tensors). Otherwise each part has a peft folder inside it, and a new head is in `head.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from autopeft import methods
from autopeft.errors import AdapterError, UserError
from autopeft.models.quantization import NONE, scheme_of
from autopeft.plan import Candidate
from autopeft.utils.files import write_text
from autopeft.utils.serialize import from_plain, read_json
from autopeft.utils.text_files import MAX_JSON_BYTES, Unreadable, parse_json, read_text

SCHEMA = 1
PLAN_FILE = "plan.json"
CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
HEAD_FILE = "head.safetensors"
PART = "part-"
"""Start of the name of a part's folder."""

_OWN_KEYS = frozenset({"auto_class", "replaces_head", "role_map"})
"""Keys of `plan.json` that no other program's file of that name has."""

_SAFE_MODEL_KWARGS = frozenset(
    {"num_labels", "id2label", "label2id", "problem_type", "pad_token_id"}
)
"""Loader arguments that a file may set; none of them can run foreign code."""

MAX_LABELS = 1_000_000
"""Most outputs of a head that a file may ask for: the head is made before weights are read."""

REMEDY = "save or download it again"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclass(frozen=True)
class SavedPlan:
    """The content of `plan.json`.

    Attributes:
        candidate: What was trained.
        base_model: Folder or hub id of the base model.
        revision: Its revision on the hub.
        auto_class: Class of transformers that loads the base model.
        model_kwargs: Further arguments of that class.
        role_map: See `autopeft.models.layout`.
        head: Paths of the modules that were trained besides the adapters.
        extra: Further JSON from the caller of `save_adapter`.
        quantization: How the base model's weights were stored: a scheme's name or "none".
        replaces_head: Whether the base model's output layer was replaced by a new one.
    """

    candidate: Candidate
    base_model: str
    revision: str | None
    auto_class: str
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    role_map: Mapping[str, Any] = field(default_factory=dict)
    head: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    quantization: str = NONE
    replaces_head: bool = False

    def write(self, folder: Path) -> None:
        """Write `plan.json`."""
        row = {
            "schema": SCHEMA,
            **self.candidate.to_json(),
            "digest": self.candidate.digest,
            "methods": {name: methods.get(name).version for name in self.candidate.plan.methods},
            "peft": peft.__version__,
            "base_model": self.base_model,
            "revision": self.revision,
            "auto_class": self.auto_class,
            "model_kwargs": {k: v for k, v in self.model_kwargs.items() if k in _SAFE_MODEL_KWARGS},
            "role_map": dict(self.role_map),
            "head": list(self.head),
            "replaces_head": self.replaces_head,
            "quantization": self.quantization,
            "extra": dict(self.extra),
        }
        write_text(folder / PLAN_FILE, json.dumps(row, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> SavedPlan:
        """Read and check `plan.json`.

        Raises:
            AdapterError: if it is damaged, unsafe, or from another version of autopeft.
        """
        path = folder / PLAN_FILE
        row = read_json(path, dict[str, Any], field="adapter", remedy=REMEDY, error=AdapterError)
        try:
            given = {**row, "candidate": Candidate.from_json(row)}
            saved = from_plain(cls, given, field="content", allow_unknown=True)
            saved = replace(saved, model_kwargs=_model_kwargs(saved.model_kwargs))
            if saved.quantization != NONE:
                scheme_of(saved.quantization)
            known = {name: methods.get(name).version for name in saved.candidate.plan.methods}
        except UserError as error:
            raise damaged(path, error.mistake) from None
        except ValueError as error:
            raise damaged(path, str(error)) from None
        schema, versions = row.get("schema"), row.get("methods")
        if schema != SCHEMA or versions != known:
            raise AdapterError(
                "adapter",
                str(path),
                f"has schema {schema} and methods {versions}, this autopeft knows schema {SCHEMA} "
                f"and methods {known}",
                "load it with the autopeft that saved it",
            )
        unsafe = set(saved.model_kwargs) - _SAFE_MODEL_KWARGS
        if unsafe or not saved.auto_class.startswith("AutoModel"):
            raise damaged(path, f"asks for {sorted(unsafe) or saved.auto_class}, which is refused")
        return saved


def holds_plan(folder: Path) -> bool:
    """Return whether a folder has a `plan.json` of autopeft's; a damaged one counts.

    Other programs write files of that name too, also beside an adapter of plain peft.
    """
    path = folder / PLAN_FILE
    if not path.is_file():
        return False
    try:
        content = parse_json(read_text(path, max_bytes=MAX_JSON_BYTES))
    except Unreadable:
        return True
    return not isinstance(content, dict) or not _OWN_KEYS.isdisjoint(content)


def tensor_files(folder: Path) -> list[Path]:
    """Return the files of tensors of a saved adapter, and none of what lies beside them."""
    names = (TENSOR_FILE, HEAD_FILE, f"{PART}*/{TENSOR_FILE}")
    return [file for name in names for file in sorted(folder.glob(name))]


@dataclass(frozen=True)
class _ModelKwargs:
    """The types of the loader arguments that a file may set."""

    num_labels: int | None = None
    id2label: Mapping[str, str] | None = None
    label2id: Mapping[str, int] | None = None
    problem_type: str | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_labels is not None and not 1 <= self.num_labels <= MAX_LABELS:
            problem = f"`1 <= num_labels <= {MAX_LABELS}` must hold"
            raise AdapterError("num_labels", self.num_labels, problem, REMEDY)


def _model_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return loader arguments with the integer keys that JSON turned into strings."""
    kwargs = dict(row)
    from_plain(_ModelKwargs, kwargs, field="model_kwargs", allow_unknown=True)
    if kwargs.get("id2label") is not None:
        kwargs["id2label"] = {int(key): name for key, name in kwargs["id2label"].items()}
    return kwargs


def damaged(path: Path, problem: str) -> AdapterError:
    """Return the error for a damaged file."""
    return AdapterError("adapter", str(path), problem, REMEDY)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write copies of tensors to a safetensors file."""
    save_file(
        {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()},
        path,
        metadata={"format": "pt"},
    )


def read_tensors(path: Path, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read a safetensors file and check its tensors against the expected ones.

    Raises:
        AdapterError: if the file is missing, a pickle or damaged, if names, shapes or kinds of
            numbers differ, or if a number is not finite.
    """
    if not path.is_file():
        pickles = [f.name for pattern in _PICKLES for f in path.parent.glob(pattern)]
        if pickles:
            raise AdapterError(
                "adapter",
                str(path.parent / pickles[0]),
                "is a pickle, which could run any code, and is not opened",
                "save the adapter as safetensors",
            )
        raise AdapterError("adapter", str(path), "no such file", "check the folder")
    try:
        found: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, f"is not a safetensors file ({error})") from error
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise damaged(path, f"lacks {len(missing)} tensors, the first {missing[0]}")
    if unknown:
        raise damaged(path, f"has {len(unknown)} tensors too many, the first {unknown[0]}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise damaged(
                path,
                f"{name} has shape {tuple(tensor.shape)}, but {tuple(expected[name].shape)} fits",
            )
        check_numbers(path, name, tensor, expected[name].dtype)
    return found


def check_numbers(path: Path, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Check that the numbers of a file's tensor mean the same in the type where they will be.

    torch casts complex numbers, whole numbers and truth values without a word.

    Raises:
        AdapterError: if they are of another kind, or not finite in that type.
    """
    if _kind(tensor.dtype) != _kind(dtype):
        own, other = (str(each).removeprefix("torch.") for each in (tensor.dtype, dtype))
        raise damaged(path, f"{name} is {own}, and {other} is needed")
    if dtype.is_floating_point and not tensor.to(dtype).float().isfinite().all():
        raise damaged(path, f"{name} holds numbers that are not finite")


def _kind(dtype: torch.dtype) -> str:
    """Return what the values of a type are."""
    if dtype == torch.bool:
        return "truth value"
    if dtype.is_complex:
        return "complex"
    return "float" if dtype.is_floating_point else "integer"
