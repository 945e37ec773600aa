"""The budget of a search, and what has been spent of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from autopeft.errors import SettingsError

_SECONDS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_FACTOR = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18}
_MOST = 1e30
"""Largest number in a budget. FLOPs are the largest, and 1e30 of them are a thousand years."""

_PART = re.compile(
    r"^(?P<number>[0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?|\.[0-9]+)\s*(?P<unit>[a-z]*)$", re.IGNORECASE
)


def _error(value: object, problem: str) -> SettingsError:
    remedy = "write e.g. 30m, 2h, 50trials, 3e15flops, or several joined by a comma"
    return SettingsError("budget", value, problem, remedy)


@dataclass(frozen=True)
class Budget:
    """Limits on a whole search, confirmation included. None means no limit of that kind.

    Attributes:
        seconds: Wall-clock seconds.
        trials: Trials of the search; confirmation trainings are not counted.
        flops: Training FLOPs, from the candidates' costs.
        text: The text that the user wrote.
    """

    seconds: float | None = None
    trials: int | None = None
    flops: float | None = None
    text: str = ""

    def __post_init__(self) -> None:
        limits = {"seconds": self.seconds, "trials": self.trials, "flops": self.flops}
        for name, limit in limits.items():
            if limit is not None and not 0 < limit < float("inf"):
                raise _error(self.text or limit, f"`{name} > 0` must hold")
        if all(limit is None for limit in limits.values()):
            raise _error(self.text, "a budget needs at least one limit")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Return the budget written as "30m", "2h 50trials", "3e15flops", ...

        Parts are joined by a comma, a plus sign or a space. Parts of time add up ("1h30m" too);
        trials and FLOPs may be named once.

        Raises:
            SettingsError: if a part is not a number with a unit, or a limit is not above 0.
        """
        seconds: float | None = None
        trials: int | None = None
        flops: float | None = None
        for part in _parts(text):
            match = _PART.match(part)
            if match and float(match["number"]) > _MOST:
                raise _error(text, f"{part!r} is beyond all budgets")
            number, unit = (match["number"], match["unit"].lower()) if match else ("", "")
            if unit in _SECONDS:
                seconds = (seconds or 0.0) + float(number) * _SECONDS[unit]
            elif unit in ("trial", "trials", "t"):
                if trials is not None or not float(number).is_integer():
                    raise _error(text, "trials must be a whole number, named once")
                trials = int(float(number))
            elif unit.endswith(("flop", "flops")) and unit[: unit.index("flop")] in _FACTOR:
                if flops is not None:
                    raise _error(text, "FLOPs may be named once")
                flops = float(number) * _FACTOR[unit[: unit.index("flop")]]
            else:
                raise _error(text, f"cannot read {part!r}")
        return cls(seconds, trials, flops, text)


def _parts(text: str) -> list[str]:
    """Split "1h30m, 50 trials" into ["1h", "30m", "50trials"]."""
    if not isinstance(text, str):
        raise _error(text, "must be a text with units")
    joined = re.sub(r"(?<=[\d.])\s+(?=[a-z])", "", text.strip(), flags=re.IGNORECASE)
    pieces = [piece for piece in re.split(r"[,;\s]+|(?<![eE])\+", joined) if piece]
    parts: list[str] = []
    for piece in pieces:
        clock = re.findall(r"\d+(?:\.\d+)?(?:h|min|m|sec|s|d)(?![a-z])", piece, flags=re.IGNORECASE)
        parts += clock if clock and "".join(clock) == piece else [piece]
    return parts


@dataclass(frozen=True)
class Spent:
    """What a search has spent over all of its sessions; kept so that a resume can continue.

    Attributes:
        seconds: Wall-clock seconds.
        trials: Trials started.
        flops: Training FLOPs, from the candidates' costs.
        phases: Wall-clock seconds of ended sessions by phase.
        workers: Worker seconds of ended sessions by activity.
    """

    seconds: float = 0.0
    trials: int = 0
    flops: float = 0.0
    phases: Mapping[str, float] = field(default_factory=dict)
    workers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        amounts = {"seconds": self.seconds, "trials": self.trials, "flops": self.flops}
        for name, amount in {**amounts, **self.phases, **self.workers}.items():
            if not 0 <= amount < math.inf:
                raise SettingsError(name, amount, "what was spent is 0 or more", "correct it")


@dataclass
class BudgetTracker:
    """Tracks what was spent of a budget, and reserves a share for confirmation.

    Trials limit the search only: a budget of trials alone never ends the confirmation.

    Attributes:
        confirm_share: Share of seconds and FLOPs reserved for confirmation, in [0, 1).
        spent: What was spent so far, earlier sessions included.
    """

    budget: Budget
    confirm_share: float = 0.0
    spent: Spent = field(default_factory=Spent)

    def __post_init__(self) -> None:
        if not 0.0 <= self.confirm_share < 1.0:
            raise SettingsError(
                "confirm_share", self.confirm_share, "`0 <= confirm_share < 1` must hold", "use 0.3"
            )

    def spend(self, *, seconds: float = 0.0, trials: int = 0, flops: float = 0.0) -> None:
        """Add to what was spent; a negative number raises a ValueError."""
        if not min(seconds, trials, flops) >= 0:
            raise ValueError(f"spending is >= 0, but got {(seconds, trials, flops)}")
        spent = self.spent
        self.spent = replace(
            spent,
            seconds=spent.seconds + seconds,
            trials=spent.trials + trials,
            flops=spent.flops + flops,
        )

    def left(self, *, confirming: bool = False, again: bool = False) -> Budget | None:
        """Return what is left; None if any limit is used up.

        Args:
            confirming: Whether the reserve counts, and the number of trials does not.
            again: Whether it is for another try of a trial, which is counted already.
        """
        share = 1.0 if confirming else 1.0 - self.confirm_share
        limits, spent = self.budget, self.spent
        seconds = None if limits.seconds is None else limits.seconds * share - spent.seconds
        flops = None if limits.flops is None else limits.flops * share - spent.flops
        trials = None if limits.trials is None else limits.trials - spent.trials
        uncounted = confirming or again
        binding = [seconds, flops] if uncounted else [seconds, flops, trials]
        if any(limit is not None and limit <= 0 for limit in binding):
            return None
        if uncounted and seconds is None and flops is None:
            return limits
        return Budget(seconds, None if uncounted else trials, flops, limits.text)
