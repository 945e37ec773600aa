"""Upper limits: on known costs, checked before any training, and on qualities, checked after it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from autopeft.costs import Price
from autopeft.costs.objectives import COSTS, QUALITIES
from autopeft.errors import SettingsError

_PATTERN = re.compile(
    r"^\s*(?P<name>[a-z_]\w*)\s*(?P<sign><=|<|=<|≤)\s*(?P<number>-?[\d.]+(?:e[+-]?\d+)?)\s*(?P<unit>[a-z%]*)\s*$",
    re.IGNORECASE,
)
_FACTORS = {
    "": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12, "p": 1e15,
}  # fmt: skip
_BYTES = {"": 1.0, "b": 1.0} | {
    f"{prefix}{unit}": base**power
    for unit, base in (("b", 1000.0), ("ib", 1024.0))
    for power, prefix in enumerate("kmgt", start=1)
}
_REMEDY = "write e.g. trainable_params<=200k, trainable_params<=0.1% or adapter_bytes<=1MB"


def parse_bytes(field: str, text: str) -> float:
    """Return the bytes that a text such as "24GB" or "79.6 GiB" names.

    Raises:
        SettingsError: if it names none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text, re.IGNORECASE)
    if match is None or match[2].lower() not in _BYTES or not float(match[1]):
        raise SettingsError(field, text, "is no size of a memory", "write e.g. 24GB or 80GiB")
    return float(match[1]) * _BYTES[match[2].lower()]


@dataclass(frozen=True)
class Constraint:
    """One upper limit.

    Attributes:
        name: A cost that is known before training, or one of `QUALITIES`.
        limit: The largest value allowed, in the cost's unit.
        text: As the user wrote it; without spaces where it limits a quality.
    """

    name: str
    limit: float
    text: str

    @property
    def is_measured(self) -> bool:
        """Whether only training tells what it limits."""
        return self.name in QUALITIES

    def allows(self, price: Price) -> bool:
        """Return whether a price is within the limit; True where only training tells."""
        return self.is_measured or price.value(self.name) <= self.limit

    def excess(self, measured: Mapping[str, float]) -> float:
        """Return by how much a measured value is above the limit; 0 or less keeps it."""
        return measured[self.name] - self.limit

    @classmethod
    def parse(
        cls, text: str, *, base_params: int | None = None, may_be_measured: bool = False
    ) -> Constraint:
        """Parse a constraint such as "trainable_params<=200k" or "forgetting<=0.05".

        Args:
            text: A cost, `<=`, a number and a unit: k, M, G, T; for bytes kB, MB, GiB, ...; for
                trainable_params also % of the base model's parameters.
            base_params: Parameters of the base model; needed for %.
            may_be_measured: Whether it may limit one of `QUALITIES`.

        Raises:
            SettingsError: if it cannot be parsed, or its cost is not known before training.
        """
        match = _PATTERN.match(text)
        if match is None:
            raise SettingsError("constraint", text, "cannot be read", _REMEDY)
        name, unit = match["name"], match["unit"].lower()
        name = name if name in COSTS else name.lower()
        is_measured = may_be_measured and name in QUALITIES
        cost = COSTS.get(name)
        if not is_measured and (cost is None or not cost.is_known):
            known = [cost.name for cost in COSTS.parts() if cost.is_known]
            known += QUALITIES if may_be_measured else ()
            raise SettingsError(
                "constraint",
                text,
                f"{name!r} is not known before training",
                f"use {', '.join(known)}",
            )
        try:
            number = float(match["number"])
        except ValueError:
            raise SettingsError("constraint", text, "cannot read the number", _REMEDY) from None
        factors = _FACTORS | _BYTES if name.endswith("_bytes") else _FACTORS
        if unit == "%":
            if name != "trainable_params" or not base_params:
                raise SettingsError(
                    "constraint",
                    text,
                    "a percentage of the base model's parameters works for trainable_params only",
                    "give an absolute number",
                )
            limit = number / 100.0 * base_params
        elif unit in factors:
            limit = number * factors[unit]
        else:
            raise SettingsError("constraint", text, f"no such unit {unit!r}", _REMEDY)
        if limit <= 0 and not is_measured:
            raise SettingsError("constraint", text, "a limit must be above 0", _REMEDY)
        return cls(name, limit, "".join(text.split()) if is_measured else text)


def parse_constraints(
    texts: Iterable[str | Constraint], *, base_params: int | None = None
) -> tuple[Constraint, ...]:
    """Parse constraints; leave parsed ones as they are."""
    return tuple(
        text
        if isinstance(text, Constraint)
        else Constraint.parse(text, base_params=base_params, may_be_measured=True)
        for text in texts
    )
