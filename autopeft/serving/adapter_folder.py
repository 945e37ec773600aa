"""Read what a server would read of an exported folder: names, shapes and settings, no weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from autopeft.errors import AdapterError
from autopeft.serving.base_fit import BaseFit
from autopeft.serving.modelfile import Modelfile
from autopeft.serving.targeting import is_named
from autopeft.utils.expressions import endless
from autopeft.utils.serialize import read_json

_FACTOR = re.compile(r"^(?P<path>.+)\.(lora_(?P<side>[AB])\.weight|lora_(?P<gguf>[ab]))$")

PEFT_ROOT = "base_model.model."
"""Start of the names that PEFT gives tensors."""

PEFT_DEFAULT = 8
"""What PEFT takes for `r` and for `lora_alpha` where a configuration lacks them."""

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
        model_config: Content of `config.json`; empty if there is none.
        base_config: Content of the `config.json` of an adapter's base model; empty if it is not
            on this machine.
        base_modules: Paths of the base model's modules for adapters; () if they are unknown.
        base_folder: Where the base model's `config.json` lies; None if it is not on this machine.
        base_name: The base model, as `adapter_config.json` or the `Modelfile` names it.
        modelfile: What the `Modelfile` beside a GGUF file names; None if there is none.
        gguf_name: Name of the GGUF file.
        fit: How the tensors fit the base model.
    """

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    gguf: Mapping[str, Any] | None = None
    gguf_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    has_model: bool = False
    model_config: Mapping[str, Any] = field(default_factory=dict)
    base_config: Mapping[str, Any] = field(default_factory=dict)
    base_modules: tuple[str, ...] = ()
    base_folder: Path | None = None
    base_name: str = ""
    modelfile: Modelfile | None = None
    gguf_name: str = ""
    fit: BaseFit = field(default_factory=BaseFit)

    @classmethod
    def read(cls, folder: str | Path) -> AdapterFolder:
        """Read a folder.

        Raises:
            AdapterError: if there is no such folder, or a file in it is damaged.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise AdapterError("adapter", str(folder), "no such folder", _REMEDY)
        gguf_name, settings, gguf_shapes = _read_gguf(folder)
        model_config = _settings(folder / "config.json")
        config = _settings(folder / "adapter_config.json")
        shapes = _shapes(folder / "adapter_model.safetensors")
        _check_expressions(folder, config, shapes)
        modelfile = None if settings is None else Modelfile.read(folder / "Modelfile")
        base, revision = config.get("base_model_name_or_path"), config.get("revision")
        if settings is not None and not config:
            base = "" if modelfile is None else modelfile.base
        base_folder = _base_folder(base, revision, folder)
        return cls(
            folder,
            config,
            shapes,
            settings,
            gguf_shapes,
            bool(model_config) and any(folder.glob("model*.safetensors")),
            model_config,
            _base_config(base_folder),
            base_folder=base_folder,
            base_name=base if isinstance(base, str) else "",
            modelfile=modelfile,
            gguf_name=gguf_name,
        )

    @property
    def strangers(self) -> tuple[str, ...]:
        """The tensors that are no factor of a LoRA."""
        return tuple(name for name in self.shapes if not _FACTOR.match(name))

    def modules(self) -> Iterator[tuple[str, int, float]]:
        """Yield each module's path, the rank of its tensors and the scaling that peft gives it.

        A module whose tensors have rank 0 is none.
        """
        ranks = {
            match["path"]: shape[0]
            for name, shape in self.shapes.items()
            if (match := _FACTOR.match(name)) and match["side"] == "A" and shape and shape[0]
        }
        common = self.number("lora_alpha") if "lora_alpha" in self.config else PEFT_DEFAULT
        for path, rank in ranks.items():
            given = self.rank_of(path)
            own = given if given > 0 else rank
            alpha = _of_pattern(self.config.get("alpha_pattern"), path, common)
            yield path, rank, alpha / (own**0.5 if self.config.get("use_rslora") else own)

    def rank_of(self, path: str) -> float:
        """Return the rank that PEFT gives a module by the configuration; 0 if that names none."""
        rank = self.number("r") if "r" in self.config else PEFT_DEFAULT
        return _of_pattern(self.config.get("rank_pattern"), path, rank)

    def is_of_parameters(self, path: str) -> bool:
        """Return whether a module's factors are of bare parameters: of all experts, in one."""
        named = self.config.get("target_parameters")
        holders = [str(n).rpartition(".")[0] for n in named] if isinstance(named, list) else []
        place = re.sub(r"(\.base_layer)+$", "", path)
        if any(holder and f".{place}".endswith(f".{holder}") for holder in holders):
            return True
        # A parameter's name alone, as PEFT writes for "all-linear", is of any module; but where
        # one has factors that target_modules does not name, they are of such a parameter.
        targets = self.config.get("target_modules")
        return "" in holders and not is_named(targets, place.removeprefix(PEFT_ROOT))

    def number(self, name: str) -> float:
        """Return a number of the configuration; 0 if it has none."""
        return _number(self.config.get(name)) or 0.0

    def unpaired(self) -> list[str]:
        """Return the modules without two factors of one rank: matrices that are not empty."""
        sides: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in {**self.shapes, **self.gguf_shapes}.items():
            if match := _FACTOR.match(name):
                side = (match["side"] or match["gguf"]).upper()
                sides.setdefault(match["path"], {})[side] = shape
        return [
            path
            for path, own in sides.items()
            if set(own) != {"A", "B"} or not _fit(own["A"], own["B"])
        ]


def _fit(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Return whether two shapes are factors of one matrix."""
    return min(len(a), len(b)) > 1 and a[0] == b[-1] and min(*a, *b) > 0


def _of_pattern(pattern: object, path: str, default: float) -> float:
    """Return a module's value as peft finds it: a key is the end of its path, or an expression."""
    path = path.removeprefix(PEFT_ROOT)
    for key, value in pattern.items() if isinstance(pattern, Mapping) else ():
        number = _number(value)
        if number is not None and _matches(key, path):
            return number
    return default


def _matches(key: str, path: str) -> bool:
    try:
        return bool(re.match(rf"(.*\.)?({key})$", path))
    except re.error:  # A rule tells it.
        return False


def _number(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if math.isfinite(value) else None


def _check_expressions(
    folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check that the configuration's expressions can be matched with the names of modules."""
    names = [match["path"].removeprefix(PEFT_ROOT) for match in map(_FACTOR.match, shapes) if match]
    if problem := endless(config, names):
        path = str(folder / "adapter_config.json")
        raise AdapterError("adapter", path, problem, "name the modules in a list")


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return read_json(
        path,
        dict[str, Any],
        field="adapter",
        remedy="save or download it again",
        error=AdapterError,
    )


def _base_folder(base: object, revision: object, folder: Path) -> Path | None:
    """Return where the `config.json` of a base model lies, if it is on this machine."""
    if not isinstance(base, str) or not base or "\0" in base:
        return None
    # Ollama reads a path of a Modelfile from there, and PEFT from where a program runs.
    for place in (Path(base).expanduser(), folder / base):
        if (place / "config.json").is_file():
            return place
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    given = revision if isinstance(revision, str) else None
    try:
        found = try_to_load_from_cache(base, "config.json", revision=given)
    except HFValidationError:  # A folder that is elsewhere.
        return None
    return Path(found).parent if isinstance(found, str) else None


def _base_config(folder: Path | None) -> dict[str, Any]:
    try:
        return {} if folder is None else _settings(folder / "config.json")
    except AdapterError:  # Not the adapter's.
        return {}


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        problem = f"is not a safetensors file ({error})"
        raise AdapterError("adapter", str(path), problem, "save or download it again") from None


def _read_gguf(folder: Path) -> tuple[str, dict[str, Any] | None, dict[str, tuple[int, ...]]]:
    files = sorted(folder.glob("*.gguf"))
    if not files:
        return "", None, {}
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
    return files[0].name, settings, shapes
