"""Read what a server would read of an exported folder: names, shapes and settings, no weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from autopeft.errors import AdapterError
from autopeft.utils.serialize import read_json

_FACTOR = re.compile(r"^(?P<path>.+)\.(lora_(?P<side>[AB])\.weight|lora_(?P<gguf>[ab]))$")
_REMEDY = "name a folder that `autopeft export` or PEFT wrote"


@dataclass(frozen=True)
class AdapterFolder:
    """What a folder holds.

    Attributes:
        folder: The folder.
        config: Content of `adapter_config.json`; empty if there is none.
        shapes: Tensor -> shape, of `adapter_model.safetensors`.
        gguf: Settings of the GGUF file; None if there is none.
        gguf_shapes: Tensor of that file -> shape, in torch's order.
        has_model: Whether it holds a whole model, with `config.json` and weights.
    """

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    gguf: Mapping[str, Any] | None = None
    gguf_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    has_model: bool = False

    @classmethod
    def read(cls, folder: str | Path) -> AdapterFolder:
        """Read a folder.

        Raises:
            AdapterError: if there is no such folder, or a file in it is damaged.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise AdapterError("adapter", str(folder), "no such folder", _REMEDY)
        config: dict[str, Any] = {}
        if (folder / "adapter_config.json").is_file():
            config = read_json(
                folder / "adapter_config.json",
                dict[str, Any],
                field="adapter",
                remedy="save or download it again",
                error=AdapterError,
            )
        settings, gguf_shapes = _read_gguf(folder)
        return cls(
            folder,
            config,
            _shapes(folder / "adapter_model.safetensors"),
            settings,
            gguf_shapes,
            (folder / "config.json").is_file() and any(folder.glob("model*.safetensors")),
        )

    @property
    def strangers(self) -> tuple[str, ...]:
        """The tensors that are no factor of a LoRA."""
        return tuple(name for name in self.shapes if not _FACTOR.match(name))

    def modules(self) -> Iterator[tuple[str, int, float]]:
        """Yield each module's path, the rank of its tensors and the scaling that peft gives it."""
        ranks = {
            match["path"]: shape[0]
            for name, shape in self.shapes.items()
            if (match := _FACTOR.match(name)) and match["side"] == "A" and shape
        }
        for path, rank in ranks.items():
            own = self.rank_of(path) or rank
            alpha = _of_pattern(self.config.get("alpha_pattern"), path, self.number("lora_alpha"))
            yield path, rank, alpha / (own**0.5 if self.config.get("use_rslora") else own)

    def rank_of(self, path: str) -> float:
        """Return the rank that the configuration gives a module; 0 if it names none."""
        return _of_pattern(self.config.get("rank_pattern"), path, self.number("r"))

    def number(self, name: str) -> float:
        """Return a number of the configuration; 0 if it has none."""
        value = self.config.get(name)
        return float(value) if isinstance(value, int | float) else 0.0

    def unpaired(self) -> list[str]:
        """Return the modules that have one factor of the two, or whose factors do not fit."""
        sides: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in {**self.shapes, **self.gguf_shapes}.items():
            if match := _FACTOR.match(name):
                side = (match["side"] or match["gguf"]).upper()
                sides.setdefault(match["path"], {})[side] = shape
        return [
            path
            for path, own in sides.items()
            if set(own) != {"A", "B"} or own["A"][:1] != own["B"][-1:]
        ]


def _of_pattern(pattern: object, path: str, default: float) -> float:
    """Return a module's value as peft finds it: a key is the end of its path, or an expression."""
    path = path.removeprefix("base_model.model.")
    for key, value in pattern.items() if isinstance(pattern, Mapping) else ():
        if re.match(rf"(.*\.)?({key})$", path) and isinstance(value, int | float):
            return float(value)
    return default


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        problem = f"is not a safetensors file ({error})"
        raise AdapterError("adapter", str(path), problem, "save or download it again") from None


def _read_gguf(folder: Path) -> tuple[dict[str, Any] | None, dict[str, tuple[int, ...]]]:
    files = sorted(folder.glob("*.gguf"))
    if not files:
        return None, {}
    try:
        from gguf import GGUFReader
    except ImportError:
        raise AdapterError(
            "adapter", str(files[0]), "is a GGUF file", 'pip install "autopeft[gguf]"'
        ) from None
    try:
        reader = GGUFReader(files[0])
        settings = {name: each.contents() for name, each in reader.fields.items()}
        # GGUF names the fastest dimension first.
        shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    except Exception as error:  # The reader raises errors of many types.
        problem = f"is not a GGUF file ({' '.join(str(error).split())[:200]})"
        raise AdapterError("adapter", str(files[0]), problem, "write it again") from None
    return settings, shapes
