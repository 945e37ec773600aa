"""Where each member of the front stands: against the tuned LoRA and the best LoRA it can afford."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from autopeft.confirm.comparison import Comparison, Looks, compare, cost_of, quality_and_cost
from autopeft.confirm.finalists import Finalist, best_on_validation
from autopeft.costs.objectives import Objective

Answer = Literal["yes", "no", "undecided"]

_MUCH_CHEAPER = 0.5
"""A member that is only as good must cost at most this share of the tuned LoRA."""
_TOLERANCE = 0.1
"""Share of LoRA's own gain over the reference that is no difference."""
_SMALL, _SMALL_SHARE = 0.01, 0.25
"""One point is no difference, unless that is over a quarter of LoRA's own gain."""


@dataclass(frozen=True)
class Claim:
    """That the gain of one finalist over another is above a bound.

    Attributes:
        pair: The two.
        above: Shown by an interval above this.
        below: Refuted by an interval not above this; None: nothing refutes it.
    """

    pair: tuple[Finalist, Finalist]
    found: Comparison
    above: float
    below: float | None

    @property
    def answer(self) -> Answer:
        """Whether it is shown, refuted, or neither."""
        if self.found.low > self.above:
            return "yes"
        return "no" if self.below is not None and self.found.high <= self.below else "undecided"


@dataclass(frozen=True)
class Member:
    """A member of the front, and how it compares.

    Attributes:
        ratio: Its cost over the tuned LoRA's.
        opponent: The best LoRA that costs no more, or the tuned one where every LoRA costs more.
        tuned: Against the tuned LoRA.
        fair: Against the opponent.
        ways: Claims of which all of one way must hold: to be better than the tuned LoRA, or as good
            and much cheaper.
    """

    finalist: Finalist
    ratio: float
    opponent: Finalist
    tuned: Comparison
    fair: Comparison
    ways: tuple[tuple[Claim, ...], ...] = ()

    @property
    def answer(self) -> Answer:
        """Yes if the claims of a way are all shown, no if each way has one that is refuted."""
        return any_of([_all([claim.answer for claim in way]) for way in self.ways])


@dataclass(frozen=True)
class Standing:
    """How the finalists compare.

    Attributes:
        tuned: The tuned LoRA.
        reference: The base without an adapter; None if it was not confirmed.
        members: All but LoRAs and the reference.
        lora_gain: The tuned LoRA against the reference.
        margin: The largest difference that is none; None where nothing says how much matters.
        n_comparisons: Which the intervals account for.
    """

    tuned: Finalist
    reference: Finalist | None
    members: tuple[Member, ...]
    lora_gain: Comparison | None
    margin: float | None
    n_comparisons: int

    @property
    def answer(self) -> Answer:
        """Yes if a member's is, no if all are."""
        return any_of([member.answer for member in self.members])


def why_unknown(finalists: Sequence[Finalist], no_lora: str | None = None) -> str | None:
    """Return why these finalists cannot be compared, or None if they can.

    `no_lora` is why there is no LoRA baseline among them, as far as it is known.
    """
    if not any(f.origin == "baseline" and f.seeds for f in finalists):
        text = "no LoRA baseline was confirmed"
        return text if no_lora is None else f"{text}: {no_lora}"
    if not any(f.origin not in ("baseline", "reference") and f.seeds for f in finalists):
        return "nothing but LoRA was confirmed"
    if all(len(f.seeds) < 2 for f in finalists):
        why = "each finalist has one seed, so the variance between trainings is not known"
        return f"{why}; confirm with more seeds"
    return None


def standing_of(
    finalists: Sequence[Finalist],
    objectives: Sequence[Objective],
    *,
    looks: Looks | None = None,
    seed: int = 0,
) -> Standing:
    """Compare all members with the tuned LoRA and with the best LoRA that each can afford.

    Args:
        finalists: Such that `why_unknown` knows no reason.
        objectives: Quality first; costs are compared on the second.
        looks: As for `compare`.
        seed: Of the bootstrap.
    """
    quality, cost = quality_and_cost(objectives)
    loras = [f for f in finalists if f.origin == "baseline" and f.seeds]
    rivals = [f for f in finalists if f.origin not in ("baseline", "reference") and f.seeds]
    tuned = best_on_validation(loras, quality)
    reference = next((f for f in finalists if f.origin == "reference" and f.seeds), None)
    # One comparison for each member with the tuned LoRA, one with the best LoRA it can afford.
    opponents = []
    for rival in rivals:
        affordable = [lora for lora in loras if cost_ratio(lora, rival, cost) <= 1.0]
        opponents.append(best_on_validation(affordable, quality) if affordable else tuned)
    pairs = [(rival, tuned) for rival in rivals] + list(zip(rivals, opponents, strict=True))
    if reference is not None:
        pairs.append((tuned, reference))
    found = compare(pairs, quality, seed, looks=looks)
    lora_gain = found[-1] if reference is not None else None
    margin = _margin(lora_gain, quality)
    members = []
    for i, (rival, opponent) in enumerate(zip(rivals, opponents, strict=True)):
        ratio = cost_ratio(rival, tuned, cost)
        against, fair = found[i], found[len(rivals) + i]
        ways: list[tuple[Claim, ...]] = []
        if ratio <= 1.0:
            ways.append((Claim((rival, tuned), against, 0.0, margin),))
        # As good as what gains nothing is no merit.
        if ratio <= _MUCH_CHEAPER and margin is not None and reference and lora_gain:
            claims = [
                Claim((rival, tuned), against, -margin, -margin),
                Claim((tuned, reference), lora_gain, 0.0, 0.0),
            ]
            if opponent is not tuned:
                claims.append(Claim((rival, opponent), fair, 0.0, margin))
            ways.append(tuple(claims))
        members.append(Member(rival, ratio, opponent, against, fair, tuple(ways)))
    return Standing(tuned, reference, tuple(members), lora_gain, margin, len(pairs))


def _margin(lora_gain: Comparison | None, quality: Objective) -> float | None:
    """Return the largest difference that is none; None where nothing says how much matters."""
    if lora_gain is not None and lora_gain.low > 0:
        gain = lora_gain.gain
        return max(_TOLERANCE * gain, min(_SMALL, _SMALL_SHARE * gain))
    low, high = quality.bounds
    return _SMALL * (high - low) if math.isfinite(high - low) else None


def any_of(answers: Collection[Answer]) -> Answer:
    """Yes if one is, no if all are."""
    return "yes" if "yes" in answers else "undecided" if "undecided" in answers else "no"


def _all(answers: Collection[Answer]) -> Answer:
    """Yes if all are, no if one is."""
    return "no" if "no" in answers else "undecided" if "undecided" in answers else "yes"


def cost_ratio(first: Finalist, second: Finalist, cost: Objective | None) -> float:
    """Return the cost of the first over that of the second; 1.0 without a cost."""
    below = cost_of(second, cost)
    return cost_of(first, cost) / below if below > 0 else math.inf
