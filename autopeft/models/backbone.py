"""Load the frozen base model, or build it without weights; load its tokenizer."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from autopeft.costs import Topology
from autopeft.errors import ModelError
from autopeft.models import checkpoint
from autopeft.models.layout import Layout, RoleMap, find_layout
from autopeft.models.loading import (
    ConfigBefore,
    auto_loader,
    first_line,
    load_config,
    needs_own_code,
    not_loadable,
    own_auto_class,
)
from autopeft.models.method_hooks import SvdCache
from autopeft.models.modules import own_parameters
from autopeft.models.quantization import (
    NONE,
    check_backend,
    keep_weights,
    load_arguments,
    weight_bytes,
)
from autopeft.models.spread import connect, device_map
from autopeft.utils.device import drawn_on_host, free_memory_of
from autopeft.utils.quiet import QUANTIZERS, quiet_loggers, quiet_transformers

BARE = "AutoModel"
"""Loads models without a head. A pooler that a checkpoint lacks is not read, and not trained."""


class Backbone:
    """A frozen base model, its layout and its new head, if it has one.

    The base model's dropout is off: the frozen part then computes the same for the same rows and
    can be cached, and a candidate's own `dropout` is the only one.

    Attributes:
        model: The model; nothing in it requires a gradient unless a candidate is attached.
        attached: The candidate attached now, if any; see `autopeft.models.attach`.
        layout: Where adapters can go.
        head: Paths of the modules that the checkpoint lacks, or that are replaced (a new
            classification head); they are trained with every candidate.
        replaces_head: Whether the checkpoint's output layer, if it has one, is replaced.
        base_model: Folder or hub id it came from, "" if built in memory.
        revision: Revision of a hub model.
        auto_class: Name of the class of transformers that loads it.
        model_kwargs: Further arguments of that class.
        config_before: What `prepare_config` changed in the model's configuration.
        quantization: A scheme of `autopeft.models.quantization`, or "none".
        module_order: Path -> position among all modules of the bare model.
        svds: Decompositions of its weights, for methods that start from them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        head: Sequence[str] = (),
        replaces_head: bool = False,
        role_map: RoleMap | None = None,
        base_model: str = "",
        revision: str | None = None,
        auto_class: str = "",
        model_kwargs: Mapping[str, Any] | None = None,
        config_before: ConfigBefore | None = None,
        quantization: str = NONE,
        layout: Layout | None = None,
    ) -> None:
        self.model = model.requires_grad_(False)
        if hasattr(model, "freeze_feature_encoder"):
            # wav2vec 2.0's and its kin's would make their input require a gradient.
            model.freeze_feature_encoder()  # type: ignore[operator]
        self.head = tuple(head)
        self.replaces_head = replaces_head
        self.role_map = dict(role_map or {})
        self.base_model = base_model
        self.revision = revision
        self.auto_class = auto_class or type(model).__name__
        self.model_kwargs = dict(model_kwargs or {})
        self.config_before = dict(config_before or {})
        self.attached: object | None = None
        self.svds = SvdCache()
        self.module_order = {path: i for i, (path, _) in enumerate(model.named_modules())}
        self.quantization = quantization
        found = layout or find_layout(
            model,
            role_map=role_map,
            head_params=sum(
                p.numel() for path in self.head for p in own_parameters(model.get_submodule(path))
            ),
            name=base_model,
        )
        topology = replace(found.topology, is_quantized=quantization != NONE)
        self.layout = replace(found, topology=topology)

    @property
    def topology(self) -> Topology:
        """The model's shapes as plain data."""
        return self.layout.topology


def load_backbone(
    model: str,
    *,
    auto_class: str,
    model_kwargs: Mapping[str, Any] | None = None,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    role_map: RoleMap | None = None,
    quantization: str = NONE,
    replaces_head: bool = False,
    n_devices: int = 1,
    reserved_bytes: float = 0.0,
) -> Backbone:
    """Load a pretrained model and freeze it.

    Args:
        model: Folder or hub id.
        auto_class: Name of a class of transformers, e.g. "AutoModelForSequenceClassification".
        model_kwargs: Further arguments of its `from_pretrained`, e.g. `{"num_labels": 2}`.
        revision: Revision of a hub model.
        device: As torch names it.
        dtype: Type of the weights, e.g. "float32" or "bfloat16".
        role_map: See `autopeft.models.layout`.
        quantization: How to store the weights inside the blocks: a scheme of
            `autopeft.models.quantization`, or "none".
        replaces_head: Whether its output layer is new even if the checkpoint has one.
        n_devices: Devices that its blocks are spread over; see `autopeft.models.spread`.
        reserved_bytes: Memory of the first of them for what follows the blocks: logits.

    Raises:
        ModelError: if there is no such model, it is not a transformer, or it has no room.
        SettingsError: if the weights cannot be quantized so, or there are fewer devices.
    """
    config, before = load_config(model, model_kwargs=model_kwargs, revision=revision)
    loader = auto_loader(auto_class)
    how: dict[str, Any] = {}
    layout = None
    kind, places = getattr(torch, dtype), {"": device}
    if quantization != NONE:
        check_backend(quantization, device)
    if quantization != NONE or n_devices > 1:
        whole = build_meta(
            model,
            auto_class=auto_class,
            model_kwargs=model_kwargs,
            revision=revision,
            role_map=role_map,
            replaces_head=replaces_head,
        )
        layout = whole.layout
        if n_devices > 1:
            room = free_memory_of(device, n_devices)
            loads = weight_bytes(whole.model, layout.blocks, quantization, kind)
            places = device_map(whole.model, layout.blocks, room, loads, reserved_bytes)
        how["device_map"] = places
        if quantization != NONE:
            how |= load_arguments(whole.model, layout.blocks, quantization, kind)
    with quiet_transformers(), quiet_loggers(*QUANTIZERS), drawn_on_host(0):
        # Weights that are missing without being a head's are reproducible.
        try:
            loaded, info = loader.from_pretrained(
                model,
                config=config,
                revision=revision or "main",
                dtype=kind,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=checkpoint.is_local_only(model),
                trust_remote_code=False,
                weights_only=True,
                **how,
            )
        except Exception as error:  # Files of others raise errors of many types.
            raise not_loadable(model, auto_class, error) from error
    if quantization != NONE:
        keep_weights(loaded)
    if layout is not None and n_devices > 1:
        connect(loaded, layout.blocks, places)
    elif not how:
        loaded = loaded.to(device)
    backbone = Backbone(
        loaded.eval(),
        head=[] if auto_class == BARE else _head(loaded, info, replaces_head),
        replaces_head=replaces_head,
        role_map=role_map,
        base_model=model,
        revision=revision,
        auto_class=auto_class,
        model_kwargs=model_kwargs,
        config_before=before,
        quantization=quantization,
        layout=layout,
    )
    _check_weights(backbone)
    return backbone


def build_meta(
    model: str,
    *,
    auto_class: str,
    model_kwargs: Mapping[str, Any] | None = None,
    revision: str | None = None,
    role_map: RoleMap | None = None,
    quantization: str = NONE,
    replaces_head: bool = False,
) -> Backbone:
    """Build the model without its weights, on the `meta` device, for shapes and costs.

    transformers "loads" tensors of the checkpoint's names and shapes, so that its own renaming and
    checks tell which modules are new, as they do for `load_backbone`.

    Raises:
        ModelError: if there is no such model, it is not a transformer, or its weights do not fit.
    """
    config, before = load_config(model, model_kwargs=model_kwargs, revision=revision)
    loader = auto_loader(auto_class)
    shapes = checkpoint.shapes(model, revision)
    how: dict[str, Any] = {"revision": revision or "main"}
    how["local_files_only"] = checkpoint.is_local_only(model)
    if shapes is not None:
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        how = {"state_dict": tensors}
    with quiet_transformers():
        try:
            with torch.device("meta"):
                built = loader.from_config(config, dtype=torch.float32, trust_remote_code=False)
            built, info = type(built).from_pretrained(
                model if shapes is None else None,
                config=config,
                dtype=torch.float32,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                weights_only=True,
                **how,
            )
        except Exception as error:  # Files of others raise errors of many types.
            raise not_loadable(model, auto_class, error) from error
    backbone = Backbone(
        built.eval(),
        head=[] if auto_class == BARE else _head(built, info, replaces_head),
        replaces_head=replaces_head,
        role_map=role_map,
        base_model=model,
        revision=revision,
        auto_class=auto_class,
        model_kwargs=model_kwargs,
        config_before=before,
        quantization=quantization,
    )
    _check_weights(backbone)
    return backbone


def build_from_config(
    model: str, *, revision: str | None = None, role_map: RoleMap | None = None
) -> Backbone:
    """Build the model of a configuration on the `meta` device; no checkpoint is looked at.

    It is of the class that its configuration names, with no new head.

    Raises:
        ModelError: if there is no such model, or it is not a transformer.
    """
    config, before = load_config(model, model_kwargs=None, revision=revision)
    auto_class = own_auto_class(config)
    try:
        with torch.device("meta"), quiet_transformers():
            built = auto_loader(auto_class).from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:  # Files of others raise errors of many types.
        raise not_loadable(model, auto_class, error) from error
    return Backbone(
        built.eval(),
        role_map=role_map,
        base_model=model,
        revision=revision,
        auto_class=auto_class,
        config_before=before,
    )


def _head(model: Any, info: Mapping[str, Any], replaces_head: bool) -> list[str]:
    """Return the paths of the modules that are new.

    Args:
        model: The loaded model.
        info: What transformers reports about loading it.
        replaces_head: Whether its output layer is new in any case.
    """
    fresh = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if replaces_head:
        fresh += _output_parameters(model)
    return sorted({key.rpartition(".")[0] for key in fresh})


def _output_parameters(model: Any) -> list[str]:
    """Return the parameters whose shape depends on the number of labels."""
    larger = copy.deepcopy(model.config)
    larger.num_labels = larger.num_labels + 1
    with torch.device("meta"), quiet_transformers():
        # Both without weights: those of the model itself may be packed in 4 bits.
        own, other = (
            dict(type(model)(config).named_parameters())
            for config in (copy.deepcopy(model.config), larger)
        )
    return [n for n, p in own.items() if n in other and other[n].shape != p.shape]


def _check_weights(backbone: Backbone) -> None:
    """Raise a ModelError if a checkpoint lacks weights inside the blocks."""
    starts = tuple(f"{path}." for path in backbone.layout.blocks)
    inside = [path for path in backbone.head if f"{path}.".startswith(starts)]
    if inside:
        raise ModelError(
            "model",
            backbone.base_model,
            f"its weights do not fit {type(backbone.model).__name__}: {inside[0]} and "
            f"{len(inside) - 1} more modules are missing",
            "use a model whose weights belong to its config.json",
        )


def load_tokenizer(model: str, *, revision: str | None = None, for_words: bool = False) -> Any:
    """Load the model's tokenizer.

    Args:
        model: Folder or hub id.
        revision: Revision of a hub model.
        for_words: Whether it is given lists of words. GPT-2's, RoBERTa's and their like then need
            `add_prefix_space=True`, or would join the words.

    Raises:
        ModelError: if there is no such model, or it has no tokenizer.
    """
    checkpoint.check_exists(model)

    def load(**kwargs: Any) -> Any:
        return transformers.AutoTokenizer.from_pretrained(
            model,
            revision=revision or "main",
            local_files_only=checkpoint.is_local_only(model),
            trust_remote_code=False,
            **kwargs,
        )

    with quiet_transformers():
        try:
            tokenizer = load()
            if for_words and joins_words(tokenizer):
                tokenizer = load(add_prefix_space=True)
        except Exception as error:  # Tokenizers raise errors of many types.
            if needs_own_code(error):
                raise not_loadable(model, "AutoTokenizer", error) from error
            raise ModelError(
                "model",
                model,
                f"its tokenizer cannot be loaded ({first_line(error)})",
                "use a folder or hub id that has tokenizer files",
            ) from error
    files = [name for name in getattr(tokenizer, "vocab_files_names", {}).values() if name]
    files = ["tokenizer.json", *files] if files else []
    if Path(model).is_dir() and files and not any((Path(model) / name).is_file() for name in files):
        # transformers would continue with an empty vocabulary.
        raise ModelError(
            "model", model, f"the folder has no tokenizer ({', '.join(files)})", "save one there"
        )
    return tokenizer


def load_processor(model: str, loader: str, *, revision: str | None = None) -> Any:
    """Load what prepares a model's images or sounds.

    Args:
        model: Folder or hub id.
        loader: Name of the class of transformers, e.g. "AutoImageProcessor".
        revision: Revision of a hub model.

    Raises:
        ModelError: if there is no such model, or it has none.
    """
    checkpoint.check_exists(model)
    with quiet_transformers():
        try:
            return getattr(transformers, loader).from_pretrained(
                model,
                revision=revision or "main",
                local_files_only=checkpoint.is_local_only(model),
                trust_remote_code=False,
            )
        except Exception as error:  # Processors raise errors of many types.
            if needs_own_code(error):
                raise not_loadable(model, loader, error) from error
            raise ModelError(
                "model",
                model,
                f"{loader} finds no processor ({first_line(error)})",
                "use a folder or hub id that has a preprocessor_config.json",
            ) from error


def joins_words(tokenizer: Any) -> bool:
    """Return whether a tokenizer that is given a list of words puts no space between them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    steps = [json.loads(backend.to_str())["pre_tokenizer"] or {}]
    steps += steps[0].get("pretokenizers", [])
    return any(step.get("type") == "ByteLevel" for step in steps) and not any(
        step.get("add_prefix_space", False) for step in steps
    )
