"""Reads and writes the files of a saved adapter: JSON and safetensors, never a pickle.

A folder holds `plan.json` and the tensors. When one peft configuration says it all, the folder is
itself a standard peft folder (`adapter_config.json`, `adapter_model.safetensors`, a new head among
its tensors); else each part has a peft folder of its own below it, and a new head is in
`head.safetensors`.
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

_SAFE_MODEL_KWARGS = frozenset({"num_labels", "id2label", "label2id", "problem_type"})
"""What a file may ask the loader of the base model for; nothing that could run foreign code."""

_REMEDY = "save or download it again"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclass(frozen=True)
class SavedPlan:
    """What `plan.json` says.

    Attributes:
        candidate: What was trained.
        base_model: Folder or hub id of the base model.
        revision: Its revision on the hub.
        auto_class: Class of transformers that loads the base model.
        model_kwargs: What else that class needs.
        role_map: How roles were mapped, where names did not tell.
        head: Paths of the modules trained besides the adapters.
        extra: Whatever the saver wanted to remember.
        quantization: How the base model's weights were stored, "none" or a scheme's name.
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

    def write(self, folder: Path) -> None:
        """Writes `plan.json`."""
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
            "quantization": self.quantization,
            "extra": dict(self.extra),
        }
        write_text(folder / PLAN_FILE, json.dumps(row, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> SavedPlan:
        """Reads and checks `plan.json`.

        Raises:
            AdapterError: if it is damaged, from a newer autopeft, or asks for what no file may.
        """
        path = folder / PLAN_FILE
        row = read_json(path, dict[str, Any], field="adapter", remedy=_REMEDY, error=AdapterError)
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


def _model_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    """What was written, with the whole-number keys that JSON made text."""
    kwargs = dict(row)
    if "id2label" in kwargs:
        kwargs["id2label"] = {int(key): name for key, name in dict(kwargs["id2label"]).items()}
    return kwargs


def damaged(path: Path, problem: str) -> AdapterError:
    """The error about a file that is not as it was saved."""
    return AdapterError("adapter", str(path), problem, _REMEDY)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a safetensors file, of copies on the CPU."""
    save_file(
        {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()},
        path,
        metadata={"format": "pt"},
    )


def read_tensors(path: Path, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Reads a safetensors file and compares it with what the model has room for.

    Args:
        path: The file.
        expected: Name -> a tensor of the right shape.

    Raises:
        AdapterError: if it is absent, a pickle, damaged, or names or shapes differ.
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
