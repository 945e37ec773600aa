"""Limits: on known costs, checked before any training, and on measured values, checked after it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from autopeft.costs import Price
from autopeft.costs.objectives import COSTS, QUALITIES, Cost, Objective, check_costs, quality_beside
from autopeft.errors import SettingsError

_PATTERN = re.compile(
    r"^\s*(?P<name>[a-z_][\w.-]*)\s*(?P<sign><=|<|=<|≤|>=|>|=>|≥)\s*(?P<number>-?[\d.]+(?:e[+-]?\d+)?)\s*(?P<unit>[a-z%]*)\s*$",
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
_REMEDY = (
    "write e.g. trainable_params<=200k, trainable_params<=0.1% or adapter_bytes<=1MB; of a quality "
    "squad.f1>=0.6"
)


_COMMA = re.compile(r"[<>=≤≥]\s*-?(?P<number>\d[\d.]*,\d[\d.,]*)")
_GROUPED = re.compile(r"[1-9]\d{0,2}(,\d{3})+(\.\d+)?")


def check_no_comma(text: str) -> None:
    """Check that no number of limits has a comma: it separates limits, and would split the number.

    Raises:
        SettingsError: naming what to write in its place.
    """
    match = _COMMA.search(text)
    if match is None:
        return
    number = match["number"].rstrip(",")
    is_grouped = _GROUPED.fullmatch(number) is not None
    plain = number.replace(",", "") if is_grouped else number.replace(",", ".", 1)
    problem = "a comma separates limits, so that a number has none"
    raise SettingsError("constraint", text, problem, f"write {plain}")


def parse_bytes(field: str, text: str | float) -> float:
    """Return the bytes that a text such as "24GB" or "79.6 GiB" names; a number is of bytes.

    Raises:
        SettingsError: if it names none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", f"{text}", re.IGNORECASE)
    factor = None if match is None else _BYTES.get(match[2].lower())
    size = 0.0 if match is None or factor is None else float(match[1]) * factor
    if not 0 < size < math.inf:
        raise SettingsError(field, text, "is no size of a memory", "write e.g. 24GB or 80GiB")
    return size


@dataclass(frozen=True)
class Constraint:
    """One limit.

    Attributes:
        name: A cost, or a further quality (`quality_beside`).
        limit: The largest value allowed, in the cost's unit.
        text: As the user wrote it; without spaces where it limits what is measured.
        is_lower: Whether `limit` is the least value allowed instead, of what is maximized.
    """

    name: str
    limit: float
    text: str
    is_lower: bool = False

    @property
    def is_measured(self) -> bool:
        """Whether only training tells what it limits."""
        return self.measured_cost is not None or self.is_of_quality

    @property
    def is_of_quality(self) -> bool:
        """Whether it limits a further quality."""
        return quality_beside(self.name) is not None

    @property
    def measured_cost(self) -> Cost | None:
        """The measured cost that it limits; None where it limits a known one or a quality."""
        cost = COSTS.get(self.name)
        return cost if cost is not None and cost.is_measured else None

    @property
    def quality(self) -> Objective:
        """What it limits, as a quality: a lower limit is one on something to maximize."""
        return Objective(self.name, "maximize" if self.is_lower else "minimize")

    def check_direction(self, quality: Objective) -> None:
        """Check that it limits a quality, or a measured cost, in the direction that is worse.

        Raises:
            SettingsError: if it does not: it would keep off the front what is best.
        """
        if self.quality.direction == quality.direction:
            return
        sign = ">=" if quality.direction == "maximize" else "<="
        problem = f"{self.name} is {quality.direction}d, so its limit is written {sign}"
        remedy = f"use {self.name}{sign}{self.limit:g}"
        raise SettingsError("constraint", self.text, problem, remedy)

    def allows(self, price: Price) -> bool:
        """Return whether a price is within the limit; True where only training tells."""
        return self.is_measured or price.value(self.name) <= self.limit

    def excess(self, measured: Mapping[str, float]) -> float:
        """Return by how much a measured value is beyond the limit; 0 or less keeps it."""
        much = measured[self.name] - self.limit
        return -much if self.is_lower else much

    def is_kept(self, price: Price, measured: Mapping[str, float]) -> bool:
        """Return whether a trained candidate is within the limit; False where nothing tells."""
        if self.is_measured:
            return self.name in measured and self.excess(measured) <= 0
        return self.allows(price)

    @classmethod
    def parse(cls, text: str, *, base_params: int | None = None) -> Constraint:
        """Parse a constraint such as "trainable_params<=200k" or "squad.f1>=0.6".

        Args:
            text: A cost or a further quality, `<=`, a number and a unit: k, M, G, T; for bytes kB,
                MB, GiB, ...; for trainable_params also % of the base model's parameters; for a
                measured cost also its own, as ms. `>=` for a quality or a measured cost that is
                maximized.
            base_params: Parameters of the base model; needed for %.

        Raises:
            SettingsError: if it cannot be parsed, or limits nothing that is computed or measured.

        Example:
            >>> from autopeft.costs.constraints import Constraint
            >>> limit = Constraint.parse("serving_latency_ms <= 50ms")
            >>> limit.limit, limit.is_measured, limit.excess({"serving_latency_ms": 52.0})
            (50.0, True, 2.0)
        """
        check_no_comma(text)
        match = _PATTERN.match(text)
        if match is None:
            raise SettingsError("constraint", text, "cannot be read", _REMEDY)
        name, unit = match["name"], match["unit"].lower()
        if name not in COSTS and "." not in name:
            name = name.lower()
        cost = COSTS.get(name)
        if cost is None and quality_beside(name) is None:
            known = [cost.name for cost in COSTS.parts()]
            known += (*QUALITIES, "NAME.METRIC of a further task")
            problem = f"{name!r} is no cost, and no quality beside the leading one"
            raise SettingsError("constraint", text, problem, f"use {', '.join(known)}")
        is_measured = cls(name, 0.0, text).is_measured
        is_lower = match["sign"] in (">=", ">", "=>", "≥")
        if is_lower and not is_measured:
            problem = f"{name} is a cost, which has an upper limit"
            raise SettingsError("constraint", text, problem, _REMEDY)
        try:
            number = float(match["number"])
        except ValueError:
            raise SettingsError("constraint", text, "cannot read the number", _REMEDY) from None
        factors = _FACTORS | _BYTES if name.endswith("_bytes") else _FACTORS
        if cost is None:
            factors = {"": 1.0}  # Of a quality.
        elif is_measured:
            factors = {**factors, cost.unit.lower(): 1.0}
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
        if limit <= 0 and cost is not None:
            raise SettingsError("constraint", text, "a limit must be above 0", _REMEDY)
        found = cls(name, limit, "".join(text.split()) if is_measured else text, is_lower)
        if name in QUALITIES:
            found.check_direction(QUALITIES[name])
        if found.measured_cost is not None:
            found.check_direction(found.measured_cost)
        return found


def is_limit(text: str) -> bool:
    """Return whether a text states a limit, well or badly, and is no name."""
    return any(sign in text for sign in "<>≤≥")


def parse_constraints(
    texts: Iterable[str | Constraint], *, base_params: int | None = None
) -> tuple[Constraint, ...]:
    """Parse constraints; leave parsed ones as they are."""
    return tuple(
        text if isinstance(text, Constraint) else Constraint.parse(text, base_params=base_params)
        for text in texts
    )


def limited_costs(limits: Iterable[Constraint], objectives: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the names of measured costs that have limits and are no objectives, each once."""
    costs = [limit.name for limit in limits if limit.measured_cost is not None]
    return tuple(name for name in dict.fromkeys(costs) if name not in set(objectives))


def check_limits(limits: Iterable[Constraint], settings: Any, task: Any, device: str) -> None:
    """Check that a search with these settings can measure the costs that it limits.

    Args:
        limits: Limits; those on known costs and qualities are passed over.
        settings: The search's settings.
        task: Its task.
        device: Kind of the workers' devices, as torch names it.

    Raises:
        SettingsError: if it cannot.
    """
    for limit in limits:
        if limit.measured_cost is None:
            continue
        try:
            check_costs([limit.measured_cost], settings, task, device)
        except SettingsError as error:
            if error.field != "objectives":
                raise
            raise SettingsError("constraint", limit.text, error.problem, error.remedy) from None
