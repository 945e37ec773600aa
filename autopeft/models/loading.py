"""Load a model's configuration, and turn loading errors into clear ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from autopeft.errors import ModelError
from autopeft.models import checkpoint
from autopeft.models.sites import max_positions
from autopeft.plan import MAX_LAYERS
from autopeft.utils.device import is_accelerator, is_here, supports_bf16
from autopeft.utils.quiet import quiet_transformers

ConfigBefore = dict[tuple[str, str], Any]
"""(name of a sub-configuration or "", field) -> the value before `prepare_config`."""


def load_config(
    model: str, *, model_kwargs: Mapping[str, Any] | None, revision: str | None
) -> tuple[Any, ConfigBefore]:
    """Load a model's configuration and prepare it for training; also return what was changed.

    Raises:
        ModelError: if there is no such model, or its type is unknown.
    """
    checkpoint.check_exists(model)
    where: dict[str, Any] = {
        "revision": revision or "main",
        "local_files_only": checkpoint.is_local_only(model),
    }
    with quiet_transformers():
        try:
            row, _ = transformers.PretrainedConfig.get_config_dict(model, **where)
            check_counts(model, row)
            config = transformers.AutoConfig.from_pretrained(
                model, trust_remote_code=False, **where, **(model_kwargs or {})
            )
        except ModelError:
            raise
        except Exception as error:  # Of many types, where a file holds values of other types.
            raise not_loadable(model, "AutoConfig", error) from error
    return config, prepare_config(config)


_MOST_LABELS, _MOST = 1_000_000, 2**31 - 1


def check_counts(model: str, row: Mapping[str, Any]) -> None:
    """Check the numbers of a model's `config.json` before anything of their size is made.

    Raises:
        ModelError: if it names more blocks, labels or units than any model has.
    """
    for name, value in row.items():
        if isinstance(value, Mapping):
            check_counts(model, value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        most = MAX_LAYERS if "layers" in name else _MOST_LABELS if name == "num_labels" else _MOST
        if abs(value) > most:
            problem = f"its config.json has {name}={value:.6g}, and {most} is the most"
            raise ModelError("model", model, problem, "correct the file, or download it again")


def prepare_config(config: Any) -> ConfigBefore:
    """Prepare a configuration for training; return what was changed.

    Off are dropout, the cache of keys, and the random masks of wav2vec 2.0 and Whisper.
    """
    before: ConfigBefore = {}
    for part in ("", *getattr(config, "sub_configs", {})):
        holder = getattr(config, part, None) if part else config
        for name, value in list(vars(holder).items()) if holder is not None else ():
            is_dropout = "drop" in name and isinstance(value, float) and 0.0 < value < 1.0
            if is_dropout or (name in ("use_cache", "apply_spec_augment") and value is True):
                before[part, name] = value
                setattr(holder, name, 0.0 if is_dropout else False)
    return before


def position_limit(config: Any) -> int | None:
    """Return the longest row that a model's positions allow, in tokens; None if it says nothing.

    Tables of positions are asked themselves: RoBERTa's cannot use its first rows.
    """
    stated = getattr(config.get_text_config(), "max_position_embeddings", None)
    model = _shallow_model(config)
    table = None if model is None else max_positions(model)
    limits = [int(n) for n in (stated, table) if isinstance(n, int) and n > 0]
    return min(limits) if limits else None


def embedding_rows(config: Any) -> int | None:
    """Return how many tokens a model's input embedding has; None if it has none of its own."""
    model = _shallow_model(config)
    try:
        table = None if model is None else model.get_input_embeddings()
    except NotImplementedError:
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def _shallow_model(config: Any) -> Any:
    """Return the model with one block and without weights; None if it cannot be this shallow."""
    shallow = copy.deepcopy(config)
    try:
        for part in {id(c): c for c in (shallow, shallow.get_text_config())}.values():
            part.num_hidden_layers = 1
        with torch.device("meta"), quiet_transformers():
            return transformers.AutoModel.from_config(shallow, trust_remote_code=False)
    except Exception:  # Models raise errors of many types; nothing is known then.
        return None


def base_dtype(device: str, precision: str) -> str:
    """Return the type of frozen weights: on an accelerator bf16, unless fp32 is asked for.

    A frozen weight in fp32 would be rounded at each use there, and takes twice the memory.

    Example:
        >>> from autopeft.models.loading import base_dtype
        >>> base_dtype("cuda", "auto"), base_dtype("cpu", "auto")
        ('bfloat16', 'float32')
    """
    if not is_accelerator(device) or precision == "fp32":
        return "float32"
    return "float32" if is_here(device) and not supports_bf16(device) else "bfloat16"


def own_dtype(model: str, *, revision: str | None = None) -> str:
    """Return the type of a checkpoint's weights, as its configuration names it; else "float32".

    Raises:
        ModelError: if there is no such model, or its type is unknown.
    """
    config, _ = load_config(model, model_kwargs=None, revision=revision)
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return str(named or "float32").removeprefix("torch.")


def restore_config(config: Any, before: ConfigBefore) -> None:
    """Undo `prepare_config`."""
    for (part, name), value in before.items():
        setattr(getattr(config, part) if part else config, name, value)


def auto_loader(auto_class: str) -> Any:
    """Return the class of transformers of that name.

    Raises:
        ModelError: if there is none.
    """
    loader = getattr(transformers, auto_class, None)
    if loader is None or not hasattr(loader, "from_pretrained"):
        raise ModelError(
            "auto_class",
            auto_class,
            "transformers has no such class",
            "use an AutoModelFor... name",
        )
    return loader


_SUFFIXES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForImageClassification": "AutoModelForImageClassification",
}
"""End of an architecture's name -> the class of transformers that loads it."""


def own_auto_class(config: Any) -> str:
    """Return the class of transformers that loads a model as its checkpoint was saved.

    The bare model's where its configuration names no architecture known here.
    """
    for architecture in getattr(config, "architectures", None) or ():
        if (found := auto_class_of(architecture, config)) is not None:
            return found
    return "AutoModel"


def auto_class_of(architecture: str, config: Any) -> str | None:
    """Return the class of transformers that loads an architecture, named by its class; or None."""
    if getattr(config, "is_encoder_decoder", False) and "Generation" in architecture:
        return "AutoModelForSeq2SeqLM"
    fitting = (loader for suffix, loader in _SUFFIXES.items() if architecture.endswith(suffix))
    return next(fitting, None)


def first_line(error: BaseException) -> str:
    """Return the beginning of an error's text on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def needs_own_code(error: BaseException) -> bool:
    """Return whether transformers refused a model because only code beside it could load it."""
    return any(word in str(error) for word in ("trust_remote_code", "custom code"))


def not_loadable(model: str, what: str, error: BaseException) -> ModelError:
    """Return the error for something that transformers could not load."""
    if not Path(model).is_dir() and checkpoint.is_local_only(model):
        return ModelError(
            "model",
            model,
            "no such folder, not in the hub's cache, and the hub cannot be reached",
            "check the path, or go online",
        )
    if needs_own_code(error):
        return ModelError(
            "model",
            model,
            "comes with code of its own, which autopeft does not run",
            "use a model that transformers has itself, or load it in a program of yours and give "
            "the object as model=",
        )
    return ModelError(
        "model",
        model,
        f"{what} cannot load it ({first_line(error)})",
        "use the folder or hub id of a transformer",
    )
