"""How the tensors of an adapter fit the modules of its base model: what was found, as plain names.

Who loads the base model's code finds it (`autopeft.models.check_export`); the rules read it here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BaseFit:
    """What a comparison of an adapter with its base model found.

    Attributes:
        missing: Tensors of modules that the configuration targets, which the adapter lacks.
        unknown: Tensors of the adapter that belong to no module of the base model.
        untargeted: Tensors of modules that it has and the configuration does not target.
        misshapen: Tensors of other shapes than the base model's modules need, with both shapes.
        unknown_type: What is wrong with `peft_type`; "" if PEFT knows it.
        not_compared: Why nothing is known; "" if it was compared.
    """

    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    untargeted: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    unknown_type: str = ""
    not_compared: str = ""
