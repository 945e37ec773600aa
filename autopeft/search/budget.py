"""What a search may spend, and the ledger of what it has spent."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from autopeft.errors import SettingsError

_SECONDS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_PREFIX = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18}
_PART = re.compile(r"^(?P<number>\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)\s*(?P<unit>[a-z]*)$", re.IGNORECASE)
_REMEDY = "write e.g. 30m, 2h, 50trials, 3e15flops, or several joined by a comma"


@dataclass(frozen=True)
class Budget:
    """Limits on a whole search, confirmation included. None means no limit of that kind.

    Attributes:
        seconds: Wall-clock seconds.
        trials: Trials of the search; confirmation trainings are not counted.
        flops: Training FLOPs as priced.
        text: As the user wrote it.
    """

    seconds: float | None = None
    trials: int | None = None
    flops: float | None = None
    text: str = ""

    def __post_init__(self) -> None:
        limits = {"seconds": self.seconds, "trials": self.trials, "flops": self.flops}
        for name, limit in limits.items():
            if limit is not None and not 0 < limit < float("inf"):
                raise SettingsError("budget", self.text or limit, f"`{name} > 0` must hold", _REMEDY)
        if all(limit is None for limit in limits.values()):
            raise SettingsError("budget", self.text, "a budget needs at least one limit", _REMEDY)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """The budget written as "30m", "2h 50trials", "3e15flops", ...

        Parts are joined by a comma, a plus sign or a space. Parts of time add up ("1h30m" too);
        naming trials or FLOPs twice is a mistake.

        Raises:
            SettingsError: if a part is not a number with a unit, or a limit is not above 0.
        """
        seconds: float | None = None
        trials: int | None = None
        flops: float | None = None
        for part in _parts(text):
            match = _PART.match(part)
            number, unit = (match["number"], match["unit"].lower()) if match else ("", "")
            if unit in _SECONDS:
                seconds = (seconds or 0.0) + float(number) * _SECONDS[unit]
            elif unit in ("trial", "trials", "t"):
                if trials is not None or float(number) != int(float(number)):
                    raise SettingsError("budget", text, "one whole number of trials", _REMEDY)
                trials = int(float(number))
            elif unit.endswith(("flop", "flops")) and unit[: unit.index("flop")] in _PREFIX:
                if flops is not None:
                    raise SettingsError("budget", text, "FLOPs are named twice", _REMEDY)
                flops = float(number) * _PREFIX[unit[: unit.index("flop")]]
            else:
                raise SettingsError("budget", text, f"cannot read {part!r}", _REMEDY)
        return cls(seconds, trials, flops, text)


def _parts(text: str) -> list[str]:
    """Split "1h30m, 50 trials" into ["1h", "30m", "50trials"]."""
    if not isinstance(text, str):
        raise SettingsError("budget", text, "a budget is a text with units", _REMEDY)
    joined = re.sub(r"(?<=[\d.])\s+(?=[a-z])", "", text.strip(), flags=re.IGNORECASE)
    pieces = [piece for piece in re.split(r"[,;\s]+|(?<![eE])\+", joined) if piece]
    parts: list[str] = []
    for piece in pieces:
        clock = re.findall(r"\d+(?:\.\d+)?(?:h|min|m|sec|s|d)(?![a-z])", piece, flags=re.IGNORECASE)
        parts += clock if clock and "".join(clock) == piece else [piece]
    return parts


class Ledger:
    """What was spent of a budget; a part of seconds and FLOPs is held back for confirmation.

    The clock runs from construction. Trials limit the search only: confirmation trains without
    asking for trials, so a budget of trials alone never ends it.

    Args:
        budget: The limits.
        confirm_share: Share of seconds and FLOPs kept for confirmation, in [0, 1).
        spent: What earlier sessions of the same run spent, as `to_json` wrote it.
        clock: Seconds that only rise.

    Raises:
        SettingsError: if `confirm_share` is outside [0, 1).
    """

    def __init__(
        self,
        budget: Budget,
        confirm_share: float = 0.0,
        *,
        spent: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0.0 <= confirm_share < 1.0:
            raise SettingsError(
                "confirm_share", confirm_share, "`0 <= confirm_share < 1` must hold", "use e.g. 0.3"
            )
        earlier = dict(spent or {})
        self.budget = budget
        self.confirm_share = confirm_share
        self.spent_trials = int(earlier.get("trials", 0))
        self.spent_flops = float(earlier.get("flops", 0.0))
        self._clock = clock
        self._began = clock() - float(earlier.get("seconds", 0.0))

    def add_trial(self) -> None:
        """One more trial was started."""
        self.spent_trials += 1

    def add_flops(self, flops: float) -> None:
        """Training FLOPs, as priced, were spent.

        Raises:
            ValueError: if negative.
        """
        if not flops >= 0:
            raise ValueError(f"`flops >= 0` must hold, but got {flops}")
        self.spent_flops += flops

    @property
    def spent_seconds(self) -> float:
        """Wall-clock seconds so far, earlier sessions included."""
        return self._clock() - self._began

    @property
    def seconds_left(self) -> float:
        """Of the whole budget; inf without a time limit, negative once overdrawn."""
        return (self.budget.seconds or float("inf")) - self.spent_seconds

    @property
    def search_seconds_left(self) -> float:
        """Of the search's part of the budget."""
        limit = self.budget.seconds or float("inf")
        return limit * (1.0 - self.confirm_share) - self.spent_seconds

    @property
    def reserved_seconds(self) -> float:
        """Held back for confirmation; 0 without a time limit."""
        return (self.budget.seconds or 0.0) * self.confirm_share

    def search_is_over(self, *, seconds_ahead: float = 0.0) -> bool:
        """Whether the search's part of any limit is used up.

        Args:
            seconds_ahead: What the next piece of work is expected to take.
        """
        flops, trials = self.budget.flops, self.budget.trials
        return (
            self.search_seconds_left - seconds_ahead <= 0
            or (flops is not None and self.spent_flops >= flops * (1.0 - self.confirm_share))
            or (trials is not None and self.spent_trials >= trials)
        )

    def is_over(self) -> bool:
        """Whether nothing is left at all: neither seconds nor FLOPs, the reserve included."""
        flops = self.budget.flops
        return self.seconds_left <= 0 or (flops is not None and self.spent_flops >= flops)

    def fraction_spent(self) -> float:
        """How far the search's part is used up: the largest share over the limits, in [0, 1]."""
        kept = 1.0 - self.confirm_share
        shares = [0.0]
        if self.budget.seconds is not None:
            shares.append(self.spent_seconds / (self.budget.seconds * kept))
        if self.budget.flops is not None:
            shares.append(self.spent_flops / (self.budget.flops * kept))
        if self.budget.trials is not None:
            shares.append(self.spent_trials / self.budget.trials)
        return min(1.0, max(shares))

    def to_json(self) -> dict[str, float]:
        """What was spent: plain numbers, to be kept with the study and given back as `spent`."""
        return {
            "seconds": self.spent_seconds,
            "trials": self.spent_trials,
            "flops": self.spent_flops,
        }
