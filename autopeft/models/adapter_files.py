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

SCHEMA = 1
PLAN_FILE = "plan.json"
CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
HEAD_FILE = "head.safetensors"

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
    """Read a safetensors file and check its names and shapes against the expected tensors.

    Raises:
        AdapterError: if the file is missing, a pickle or damaged, or if names or shapes differ.
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
    return found
