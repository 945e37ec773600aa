"""The verdict: does the front beat a well-tuned LoRA? Yes, no, or undecided.

Validation scores make all choices (the tuned LoRA); test scores only judge. "Yes" takes a
difference beyond chance, "no" takes the opposite: an interval that excludes every difference above
a stated margin (an equivalence test: Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987). Between
them the run could not tell, and says what it could have told (`power`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from autopeft.confirm.comparison import Comparison, compare, cost_of
from autopeft.confirm.finalists import Finalist, best_on_validation
from autopeft.confirm.power import Power, power_of, shown_power
from autopeft.costs.objectives import Objective

Answer = Literal["yes", "no", "undecided"]

_MUCH_CHEAPER = 0.5
"""A member that is only as good must cost at most this share of the tuned LoRA."""
_TOLERANCE = 0.1
"""Share of LoRA's own gain over the reference that is no difference."""
_SMALL, _SMALL_SHARE = 0.01, 0.25
"""One point is no difference, unless that is over a quarter of LoRA's own gain."""


@dataclass(frozen=True)
class LevelVerdict:
    """One member of the front against the best LoRA at its cost.

    Attributes:
        digest: The front member.
        result: "wins", "ties" or "loses", on test quality, after correction for many comparisons.
            A tie is a difference that was not shown, in either direction.
        gain: Quality of the member minus quality of the tuned LoRA, sign such that more is better.
        gain_ci: Its corrected 95 % interval, same sign.
        cost_ratio: The member's first cost over that LoRA's.
        against: Digest of the LoRA compared with: the best one that costs no more than the member,
            or the tuned one where every LoRA costs more.
    """

    digest: str
    result: Literal["wins", "ties", "loses"]
    gain: float
    gain_ci: tuple[float, float]
    cost_ratio: float
    against: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether the front beats a well-tuned LoRA.

    Attributes:
        beats_lora: Whether the answer is yes.
        text: The answer with its reasons, for people.
        levels: Each member against the best LoRA at its cost.
        answer: "yes"; "no": whatever a member gains is within the margin; or "undecided".
        power: What the run could have shown; None where nothing was compared.

    Example:
        >>> verdict = autopeft.SearchResult.read("runs/first").verdict
        >>> verdict.answer in ("yes", "no", "undecided")
        True
    """

    beats_lora: bool
    text: str
    levels: tuple[LevelVerdict, ...] = ()
    answer: Answer = "undecided"
    power: Power | None = None


@dataclass(frozen=True)
class _Member:
    """A member of the front, and how it compares.

    Attributes:
        ratio: Its cost over the tuned LoRA's.
        tuned: Against the tuned LoRA.
        fair: Against the best LoRA that costs no more.
        has_cheaper_lora: Whether there is a LoRA that costs no more, other than the tuned one.
    """

    finalist: Finalist
    ratio: float
    tuned: Comparison
    fair: Comparison
    has_cheaper_lora: bool


def undecided(why: str) -> Verdict:
    """Return the verdict of a run that cannot tell."""
    return Verdict(False, f"Undecided: {why}.")


def judge(
    finalists: Sequence[Finalist],
    objectives: Sequence[Objective],
    *,
    n_proposals: int | None = None,
    seed: int = 0,
) -> Verdict:
    """Compare the front with the tuned LoRA, member by member and in one sentence.

    The answer is yes if some member is better than the tuned LoRA beyond chance at no more cost, or
    as good (worse by less than the margin) at no more than half its cost, where LoRA itself beats
    training no adapter and the member beats the best LoRA it can afford. It is no if every member
    is shown to be neither. The margin is a tenth of LoRA's own gain over no adapter, at least one
    point (or a quarter of that gain, if that is less).

    Args:
        finalists: Origin "baseline" marks LoRAs, "reference" the untrained base; all others are
            members of the front.
        objectives: Quality first; costs are compared on the second.
        n_proposals: Trials that the searcher proposed itself; None if that is not known. With none,
            nothing is claimed: neither LoRA nor its rivals were searched for.
        seed: Of the bootstrap.
    """
    quality, cost = objectives[0], objectives[1] if len(objectives) > 1 else None
    loras = [f for f in finalists if f.origin == "baseline" and f.seeds]
    rivals = [f for f in finalists if f.origin not in ("baseline", "reference") and f.seeds]
    if not loras:
        return undecided("no LoRA baseline was confirmed")
    if not rivals:
        return undecided("nothing but LoRA was confirmed")
    if all(len(f.seeds) < 2 for f in finalists):
        why = "each finalist has one seed, so the variance between trainings is not known"
        return undecided(f"{why}; confirm with more seeds")
    tuned = best_on_validation(loras, quality)
    reference = next((f for f in finalists if f.origin == "reference" and f.seeds), None)
    # One comparison for each member with the tuned LoRA, one with the best LoRA it can afford.
    opponents = []
    for rival in rivals:
        affordable = [lora for lora in loras if _ratio(lora, rival, cost) <= 1.0]
        opponents.append(best_on_validation(affordable, quality) if affordable else tuned)
    pairs = [(rival, tuned) for rival in rivals] + list(zip(rivals, opponents, strict=True))
    if reference is not None:
        pairs.append((tuned, reference))
    found = compare(pairs, quality, seed)
    lora_gain = found[-1] if reference is not None else None
    margin = _margin(lora_gain, quality)
    members = [
        _Member(
            rival,
            _ratio(rival, tuned, cost),
            found[i],
            found[len(rivals) + i],
            opponent is not tuned,
        )
        for i, (rival, opponent) in enumerate(zip(rivals, opponents, strict=True))
    ]
    levels = tuple(
        LevelVerdict(
            member.finalist.digest,
            "wins" if member.fair.low > 0 else "loses" if member.fair.high < 0 else "ties",
            member.fair.gain,
            (member.fair.low, member.fair.high),
            _ratio(member.finalist, opponent, cost),
            opponent.digest,
        )
        for member, opponent in zip(members, opponents, strict=True)
    )
    answers = {m.finalist.digest: _answer(m, lora_gain, margin) for m in members}
    answer = _any(list(answers.values()))
    told = _most_telling(members, answers, answer, cost)
    power = power_of(
        told.tuned,
        margin,
        n_rows=len(tuned.seeds[0].test_rows),
        n_seeds=len(tuned.seeds),
        is_share=quality.bounds == (0.0, 1.0),
    )
    text = _sentence(answer, told, tuned, len(pairs), lora_gain, power, quality, cost)
    if n_proposals == 0:
        answer = "undecided"
        text = (
            "Undecided: the searcher made no proposal of its own, so neither LoRA nor its rivals "
            f"were searched for; raise the budget. Of what was tried: {text}"
        )
    return Verdict(answer == "yes", text, levels, answer, power)


def _margin(lora_gain: Comparison | None, quality: Objective) -> float | None:
    """Return the largest difference that is none; None where nothing says how much matters."""
    if lora_gain is not None and lora_gain.low > 0:
        gain = lora_gain.gain
        return max(_TOLERANCE * gain, min(_SMALL, _SMALL_SHARE * gain))
    low, high = quality.bounds
    return _SMALL * (high - low) if math.isfinite(high - low) else None


def _answer(member: _Member, lora_gain: Comparison | None, margin: float | None) -> Answer:
    """Return whether a member is better than the tuned LoRA, or as good and much cheaper."""
    ways: list[Answer] = []
    if member.ratio <= 1.0:
        ways.append(_shown(member.tuned, 0.0, margin))
    if member.ratio <= _MUCH_CHEAPER and margin is not None:
        conditions = [_shown(member.tuned, -margin, -margin)]
        if member.has_cheaper_lora:
            conditions.append(_shown(member.fair, 0.0, margin))
        # As good as what gains nothing is no merit.
        conditions.append("no" if lora_gain is None else _shown(lora_gain, 0.0, 0.0))
        ways.append(_all(conditions))
    return _any(ways)


def _shown(found: Comparison, above: float, below: float | None) -> Answer:
    """Return whether a gain is shown to be above one bound, or not above the other."""
    if found.low > above:
        return "yes"
    return "no" if below is not None and found.high <= below else "undecided"


def _any(answers: Collection[Answer]) -> Answer:
    """Yes if one is, no if all are."""
    return "yes" if "yes" in answers else "undecided" if "undecided" in answers else "no"


def _all(answers: Collection[Answer]) -> Answer:
    """Yes if all are, no if one is."""
    return "no" if "no" in answers else "undecided" if "undecided" in answers else "yes"


def _ratio(first: Finalist, second: Finalist, cost: Objective | None) -> float:
    below = cost_of(second, cost)
    return cost_of(first, cost) / below if below > 0 else math.inf


def _most_telling(
    members: Sequence[_Member],
    answers: Mapping[str, Answer],
    answer: Answer,
    cost: Objective | None,
) -> _Member:
    """Return the member that decides: the best of those with the answer, at no more cost first."""
    # Of equal members max() takes the first, the cheapest, as the front does.
    by_cost = sorted(members, key=lambda m: cost_of(m.finalist, cost))
    deciding = [m for m in by_cost if answers[m.finalist.digest] == answer]
    if answer == "yes":
        return max(deciding, key=lambda m: (m.tuned.low > 0, m.tuned.gain))
    return max(deciding, key=lambda m: (m.ratio <= 1.0, m.tuned.gain))


def _sentence(
    answer: Answer,
    told: _Member,
    tuned: Finalist,
    n_comparisons: int,
    lora_gain: Comparison | None,
    power: Power,
    quality: Objective,
    cost: Objective | None,
) -> str:
    member, gain = told.finalist, told.tuned
    is_held_out = all(seed.is_held_out for f in (member, tuned) for seed in f.seeds)
    where = "the test split" if is_held_out else "the rows that the search selected by"
    name = f"{'+'.join(member.candidate.plan.methods) or 'no adapter'} {member.digest[:8]}"
    value = f"{quality.name} {member.mean(quality.name):.3f}"
    price = f" at {told.ratio:.2g} times its {cost.name}" if cost is not None else ""
    tuned_value = f"{tuned.mean(quality.name):.3f}"
    error = f"({gain}, corrected for {n_comparisons} comparisons)"
    if answer == "yes":
        what = "better than the tuned LoRA"
        if gain.low <= 0:
            what = f"as good as the tuned LoRA, within {power.margin:.2g}"
        return f"Yes: {name} is {what}: {value} against {tuned_value} on {where} {error}{price}."
    doubt = ""
    if lora_gain is not None and lora_gain.low <= 0:
        doubt = f"; LoRA itself is not shown to be better than no adapter ({lora_gain})"
    facts = (
        f"({name}) has {value} against {tuned_value} for the tuned LoRA on {where} "
        f"{error}{price}{doubt}."
    )
    if answer == "undecided":
        claim = "Undecided: this run cannot tell whether anything beats the tuned LoRA"
        return f"{claim}. The best other member {facts} {shown_power(power)}"
    if told.ratio > 1.0:
        return f"No: all other members cost more than the tuned LoRA. The best {facts}"
    return f"No: LoRA is as good, within {power.margin:.2g}. The best other member {facts}"
