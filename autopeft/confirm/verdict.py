"""The verdict: does the front beat a well-tuned LoRA? Yes, no, or undecided.

Validation scores make all choices (the tuned LoRA); test scores only judge. "Yes" takes a
difference beyond chance, "no" takes the opposite: an interval that excludes every difference above
a stated margin (an equivalence test: Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987). Between
them the run could not tell, and says what it could have told (`power`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from autopeft.confirm.comparison import Looks, cost_of, quality_and_cost
from autopeft.confirm.finalists import Finalist
from autopeft.confirm.power import Power, power_of, shown_power
from autopeft.confirm.standing import Answer, Member, Standing, cost_ratio, standing_of, why_unknown
from autopeft.costs.objectives import Objective

_UNSEARCHED = (
    "Undecided: the searcher made no proposal of its own, so neither LoRA nor its rivals were "
    "searched for; raise the budget"
)


_TOO_LIKELY = 0.5
"""Chance of a better LoRA above which nothing is said to beat LoRA."""


@dataclass(frozen=True)
class UntriedLora:
    """How likely a LoRA that was not tried is better than the tuned one.

    Attributes:
        n_baselines: LoRA baselines that were trained to the end.
        chance: Chance that one that was not exceeds the tuned one by the gain in question.
    """

    n_baselines: int
    chance: float

    def text(self) -> str:
        """Return the doubt in a sentence."""
        return (
            f"Undecided: LoRA itself was not tuned to the end. After {self.n_baselines} baselines, "
            f"one that was not tried makes up for the gain with a chance of {self.chance:.0%}; "
            "raise the budget. Of what was tried,"
        )


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


def undecided(why: str) -> Verdict:
    """Return the verdict of a run that cannot tell."""
    return Verdict(False, f"Undecided: {why}.")


def judge(
    finalists: Sequence[Finalist],
    objectives: Sequence[Objective],
    *,
    n_proposals: int | None = None,
    looks: Looks | None = None,
    untried: Callable[[float], UntriedLora | None] | None = None,
    no_lora: str | None = None,
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
        looks: Looks at these finalists that decided what was trained next (`race`): intervals
            account for them. None: the number of seeds was set in advance.
        untried: The chance that a LoRA which was not tried exceeds the tuned one by so much. If
            one is more likely than not to make up for the gain, a yes becomes undecided.
        no_lora: Why no LoRA is among the finalists; None: it is, or nothing says why.
        seed: Of the bootstrap.
    """
    if why := why_unknown(finalists, no_lora):
        return undecided(why)
    quality, cost = quality_and_cost(objectives)
    found = standing_of(finalists, objectives, looks=looks, seed=seed)
    answer, tuned = found.answer, found.tuned
    levels = tuple(
        LevelVerdict(
            member.finalist.digest,
            "wins" if member.fair.low > 0 else "loses" if member.fair.high < 0 else "ties",
            member.fair.gain,
            (member.fair.low, member.fair.high),
            cost_ratio(member.finalist, member.opponent, cost),
            member.opponent.digest,
        )
        for member in found.members
    )
    told = _most_telling(found, cost)
    power = power_of(
        told.tuned,
        found.margin,
        n_rows=len(tuned.seeds[0].test_rows),
        n_seeds=len(tuned.seeds),
        is_share=quality.bounds == (0.0, 1.0),
    )
    text = _sentence(found, told, power, quality, cost, is_searched=n_proposals != 0)
    if n_proposals == 0:
        answer = "undecided"
    elif answer == "yes" and untried is not None:
        doubt = untried(max(told.tuned.gain, found.margin or 0.0))
        if doubt is not None and doubt.chance > _TOO_LIKELY:
            answer, text = "undecided", f"{doubt.text()} {text.removeprefix('Yes: ')}"
    return Verdict(answer == "yes", text, levels, answer, power)


def _most_telling(found: Standing, cost: Objective | None) -> Member:
    """Return the member that decides: the best of those with the answer, at no more cost first."""
    # Of equal members max() takes the first, the cheapest, as the front does.
    by_cost = sorted(found.members, key=lambda m: cost_of(m.finalist, cost))
    deciding = [m for m in by_cost if m.answer == found.answer]
    if found.answer == "yes":
        return max(deciding, key=lambda m: (m.tuned.low > 0, m.tuned.gain))
    return max(deciding, key=lambda m: (m.ratio <= 1.0, m.tuned.gain))


def _sentence(
    found: Standing,
    told: Member,
    power: Power,
    quality: Objective,
    cost: Objective | None,
    *,
    is_searched: bool,
) -> str:
    member, gain, tuned = told.finalist, told.tuned, found.tuned
    is_held_out = all(seed.is_held_out for f in (member, tuned) for seed in f.seeds)
    where = "the test split" if is_held_out else "the rows that the search selected by"
    name = f"{'+'.join(member.candidate.plan.methods) or 'no adapter'} {member.digest[:8]}"
    if source := member.compressed_from:
        name += f", cut from {'the tuned LoRA' if source == tuned.digest else source[:8]}"
    value = f"{quality.name} {member.mean(quality.name):.3f}"
    price = f" at {told.ratio:.2g} times its {cost.name}" if cost is not None else ""
    tuned_value = f"{tuned.mean(quality.name):.3f}"
    error = f"({gain}, corrected for {found.n_comparisons} comparisons)"
    if found.answer == "yes":
        what = "better than the tuned LoRA"
        if gain.low <= 0:
            what = f"as good as the tuned LoRA, within {power.margin:.2g}"
        facts = f"{value} against {tuned_value} on {where} {error}{price}."
        text = f"{name}{',' if source else ''} is {what}: {facts}"
        return f"Yes: {text}" if is_searched else f"{_UNSEARCHED}. Of what was tried, {text}"
    doubt = ""
    if found.lora_gain is not None and found.lora_gain.low <= 0:
        doubt = f"; LoRA itself is not shown to be better than no adapter ({found.lora_gain})"
    facts = (
        f"({name}) has {value} against {tuned_value} for the tuned LoRA on {where} "
        f"{error}{price}{doubt}."
    )
    if found.answer == "undecided":
        claim = "Undecided: this run cannot tell whether anything beats the tuned LoRA"
        if not is_searched:
            claim = f"{_UNSEARCHED}. Of what was tried, nothing is shown to beat the tuned LoRA"
        return f"{claim}. The best other member {facts} {shown_power(power)}"
    claim = f"LoRA is as good, within {power.margin:.2g}. The best other member"
    if told.ratio > 1.0:
        claim = "all other members cost more than the tuned LoRA. The best"
    claim = f"No: {claim}" if is_searched else f"{_UNSEARCHED}. Of what was tried, {claim}"
    return f"{claim} {facts}"
