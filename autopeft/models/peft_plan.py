"""The plan that a peft adapter is, where autopeft has its method; then it can be priced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key

from autopeft import methods
from autopeft.methods import Method
from autopeft.models.layout import Layout
from autopeft.models.method_hooks import ADAPTER_NAME
from autopeft.plan import AdapterPlan, LayerSpec, TrainSettings
from autopeft.utils.quiet import quiet_peft

_PLACES = frozenset(
    "target_modules exclude_modules layers_to_transform layers_pattern modules_to_save task_type "
    "base_model_name_or_path revision peft_version auto_mapping inference_mode fan_in_fan_out "
    "runtime_config".split()
)
"""Fields of peft's configurations that say where an adapter is, not what it is."""


def plan_of_peft(model: PeftModel, layout: Layout) -> tuple[AdapterPlan, TrainSettings] | None:
    """Return the plan of a peft model's adapter, and settings with its dropout.

    None where no plan says it: another method, other modules, or another way to use it. The
    settings' learning rate is the method's usual one, because no file tells the adapter's.

    Args:
        model: A base model with the adapter.
        layout: Of the base model.
    """
    config = model.peft_config[ADAPTER_NAME]
    if config.is_prompt_learning:
        return None
    inner = model.get_base_model()
    adapted = {path for path, m in inner.named_modules() if isinstance(m, BaseTunerLayer)}
    for method in fitting_methods(config):
        ranks = {path: _rank(method, config, path) for path in adapted}
        specs = [
            LayerSpec(layer, role, method.name, ranks[paths[0]])
            for (layer, role), paths in layout.modules.items()
            if role in method.roles
            and adapted.issuperset(paths)
            and len({ranks[path] for path in paths}) == 1
        ]
        covered = {p for spec in specs for p in layout.modules[spec.layer, spec.role]}
        if specs and covered == adapted:
            return AdapterPlan(specs), _train(method, config)
    return None


def fitting_methods(config: Any) -> Iterator[Method]:
    """Yield the methods that a peft configuration may be, those whose start is the same first."""
    kind = config.peft_type.value
    known = [method for method in methods.all_methods() if method.peft_type == kind]
    for is_strict in (True, False):
        yield from (m for m in known if _is(m, config, is_strict=is_strict))


def _is(method: Method, config: Any, *, is_strict: bool) -> bool:
    """Return whether a configuration differs from a method's in size and place alone.

    Not strictly, it may differ in how it was initialized, which a trained adapter does not tell.
    """
    rank = getattr(config, method.rank_argument) if method.rank_argument else 0
    arguments, made = method.peft_config(rank, _train(method, config)), None
    with quiet_peft(), suppress(ValueError):  # A method has rules on ranks of its own.
        made = PEFT_TYPE_TO_CONFIG_MAPPING[arguments.pop("peft_type")](**arguments)
    if made is None:
        return False
    free = _PLACES | {method.alpha_argument, method.dropout_argument, method.input_side_argument}
    free |= {pattern for _, pattern in method.rank_patterns}
    return all(
        getattr(config, field.name) == getattr(made, field.name)
        for field in fields(made)
        if field.name not in free and (is_strict or not field.name.startswith("init_"))
    )


def _train(method: Method, config: Any) -> TrainSettings:
    """Return settings with a configuration's dropout; the rate is not in it."""
    dropout = float(getattr(config, method.dropout_argument)) if method.dropout_argument else 0.0
    return TrainSettings(sum(method.learning_rate) / 2, dropout=dropout)


def _rank(method: Method, config: Any, path: str) -> int:
    """Return the rank of one module, 0 for a method without ranks."""
    if not method.rank_argument or not method.takes_rank:
        return 0
    pattern: Mapping[str, int] = next(
        (getattr(config, p) or {} for a, p in method.rank_patterns if a == method.rank_argument), {}
    )
    rank = getattr(config, method.rank_argument)
    return int(pattern.get(get_pattern_key(pattern.keys(), path), rank))
