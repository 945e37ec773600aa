"""Does a raced confirmation decide as one with three seeds for all, with fewer trainings?

Simulated finalists: each training has luck that its validation and test scores share, and rows that
are hard for one are hard for all. The same trainings are judged twice: three seeds of each
finalist, and as the race asks for them.

    python confirmation.py --fields 100 --nulls 400
    python confirmation.py --recorded runs/first runs/second

Fields: ``null``, members as good as the tuned LoRA at slightly less cost, or worse by the margin at
much less: a yes is false. ``front``, the usual front: the cheaper, the worse. ``win``, one member
better by one to six standard deviations of a training. Recorded: finalists of real searches that
have three seeds each, as with `confirm_seeds: 3` before confirmations were races.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from autopeft.confirm.finalists import Finalist, SeedScore, confirmed_finalists
from autopeft.confirm.pick import pick_best
from autopeft.confirm.race import next_seeds, seeds_of
from autopeft.confirm.store import ConfirmationStore
from autopeft.confirm.verdict import judge
from autopeft.costs import Price
from autopeft.costs.objectives import Objective, objective
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.searcher.study import read_study
from autopeft.workspace import Workspace

OBJECTIVES = (objective("accuracy"), objective("trainable_params"))
FIXED = 3
COST = 10_000
KINDS = ("null", "front", "win")


@dataclass(frozen=True)
class Field:
    """Finalists with all their seeds, and the true qualities."""

    finalists: tuple[Finalist, ...]
    truth: Mapping[str, float]
    objectives: tuple[Objective, ...] = OBJECTIVES


def simulated(kind: str, seed: int, n_seeds: int) -> Field:
    """Return finalists of a kind: two LoRAs, the base model and three to six members."""
    rng = np.random.default_rng([KINDS.index(kind), seed])
    lora, base = rng.uniform(0.70, 0.90), rng.uniform(0.50, 0.65)
    n_rows, luck = int(rng.choice([500, 2000, 5000])), float(rng.choice([0.002, 0.004, 0.01]))
    n_members = int(rng.integers(3, 7))
    costs = np.exp(np.sort(rng.uniform(np.log(0.05), np.log(1.5), n_members)))
    if kind == "null":
        costs = rng.permutation([*rng.uniform(0.55, 1, n_members - n_members // 3), *costs])
        costs = costs[:n_members]
        margin = max(0.1 * (lora - base), min(0.01, 0.25 * (lora - base)))
        gains = np.where(costs > 0.5, 0.0, -margin)
    else:
        # The cheaper, the worse: up to half of what LoRA gains.
        gains = (lora - base) * -rng.uniform(0.0, 0.5) * np.log(np.minimum(costs, 1)) / np.log(0.05)
        gains = -np.abs(gains) + rng.normal(0, luck, n_members)
        if kind == "win":
            gains[rng.integers(n_members)] = luck * rng.uniform(1, 6)
    # (origin, quality, cost)
    arms = [("baseline", lora, 1.0), ("baseline", lora - 0.03, 0.3), ("reference", base, 0.0)]
    arms += [("search", lora + gain, cost) for gain, cost in zip(gains, costs, strict=True)]
    hardness = rng.random(n_rows)
    finalists, truth = [], {}
    for number, (origin, quality, cost) in enumerate(arms):
        is_base = origin == "reference"
        specs = [] if is_base else [LayerSpec(0, "attn.q", "lora", number + 1)]
        scores = []
        for n in range(1 if is_base else n_seeds):
            shift = 0.0 if is_base else rng.normal(0, luck)
            flips = rng.random(n_rows) < 0.1
            drawn = np.where(flips, rng.random(n_rows), hardness) < quality + shift
            validation = quality + shift + rng.normal(0, 0.006)
            test = {"accuracy": float(drawn.mean())}
            rows = tuple(drawn.astype(float).tolist())
            scores.append(SeedScore(n, {"accuracy": validation}, test, rows, test))
        params = round(COST * cost)
        price = Price(params, 4 * params, 1.0, 1)
        candidate = Candidate(AdapterPlan(specs), TrainSettings(1e-3))
        finalists.append(Finalist(candidate, price, origin, tuple(scores)))
        truth[candidate.digest] = quality
    return Field(tuple(finalists), truth)


def recorded(folder: Path) -> Field:
    """Return the finalists of a search that have three seeds or more."""
    workspace = Workspace(folder)
    settings = workspace.settings()
    trials, objectives = read_study(workspace.storage(settings), workspace.study_name(settings))
    store = ConfirmationStore(folder)
    found = confirmed_finalists(trials, store.scores(), store.compressed())
    kept = tuple(
        replace(f, seeds=f.seeds[:1]) if f.origin == "reference" else f
        for f in found
        if f.origin == "reference" or len(f.seeds) >= FIXED
    )
    return Field(kept, {}, objectives)


@dataclass(frozen=True)
class Outcome:
    """What a confirmation found, and its trainings."""

    answer: str
    pick: str | None
    n_trainings: int
    is_covered: bool
    n_rounds: int = 1


def _outcome(
    field: Field, finalists: Sequence[Finalist], looks: list[Mapping[str, int]] | None
) -> Outcome:
    verdict = judge(finalists, field.objectives, looks=looks)
    covered = all(
        level.gain_ci[0]
        <= field.truth[level.digest] - field.truth[level.against]
        <= level.gain_ci[1]
        for level in verdict.levels
        if field.truth
    )
    trained = sum(len(f.seeds) for f in finalists if _is_trained(f))
    return Outcome(verdict.answer, pick_best(finalists, field.objectives), trained, covered)


def _is_trained(finalist: Finalist) -> bool:
    return finalist.origin != "reference" and not finalist.compressed_from


def fixed(field: Field) -> Outcome:
    """Confirm with three seeds each."""
    return _outcome(field, [replace(f, seeds=f.seeds[:FIXED]) for f in field.finalists], None)


def raced(field: Field, most: int, usual: int = FIXED) -> Outcome:
    """Confirm as the race asks for seeds."""
    # What is cut from another has its seeds.
    n_seeds = {f.compressed_from or f.digest: 1 for f in field.finalists}
    looks: list[Mapping[str, int]] = []
    for n_rounds in itertools.count(1):
        now = [
            replace(f, seeds=f.seeds[: n_seeds[f.compressed_from or f.digest]])
            for f in field.finalists
        ]
        wanted = next_seeds(now, field.objectives, usual=usual, most=most, looks=looks)
        if max(n_seeds.values()) > 1:
            looks.append(seeds_of(now))
        if not wanted:
            return replace(_outcome(field, now, looks), n_rounds=n_rounds)
        for digest in wanted:
            n_seeds[digest] += 1
    raise AssertionError("the race ends")


def measured(kind: str, seeds: Sequence[int], most: int, usual: int) -> dict[str, float]:
    """Return the shares of a kind of fields."""
    pairs = []
    for seed in seeds:
        field = simulated(kind, seed, max(FIXED, most))
        pairs.append((field, fixed(field), raced(field, most, usual)))
    truth = [abs(f.truth[a.pick or ""] - f.truth[b.pick or ""]) for f, a, b in pairs]
    decided = [a.answer == b.answer for _, a, b in pairs if a.answer != "undecided"]
    mean_seeds = [b.n_trainings / sum(map(_is_trained, f.finalists)) for f, _, b in pairs]
    return {
        "seeds": float(np.mean(mean_seeds)),
        "seeds in four of five fields": float(np.quantile(mean_seeds, 0.8)),
        "rounds": float(np.mean([b.n_rounds for *_, b in pairs])),
        "trainings": sum(b.n_trainings for *_, b in pairs)
        / sum(a.n_trainings for _, a, _ in pairs),
        "same answer": float(np.mean([a.answer == b.answer for _, a, b in pairs])),
        "same where decided": float(np.mean(decided)) if decided else float("nan"),
        "opposite": float(np.mean([{a.answer, b.answer} == {"yes", "no"} for _, a, b in pairs])),
        "yes, fixed": float(np.mean([a.answer == "yes" for _, a, _ in pairs])),
        "yes, raced": float(np.mean([b.answer == "yes" for *_, b in pairs])),
        "undecided, fixed": float(np.mean([a.answer == "undecided" for _, a, _ in pairs])),
        "undecided, raced": float(np.mean([b.answer == "undecided" for *_, b in pairs])),
        "covered, fixed": float(np.mean([a.is_covered for _, a, _ in pairs])),
        "covered, raced": float(np.mean([b.is_covered for *_, b in pairs])),
        "same pick": float(np.mean([a.pick == b.pick for _, a, b in pairs])),
        "pick differs by": float(np.mean(truth)),
    }


def replay(folders: Sequence[Path], most: int, usual: int) -> None:
    """Print what real searches decide, with the seeds of all and raced."""
    for folder in folders:
        field = recorded(folder)
        one, other = fixed(field), raced(field, most, usual)
        same = "same" if one.pick == other.pick else "another"
        print(
            f"{folder}: {len(field.finalists)} finalists; {one.answer} with all seeds, "
            f"{other.answer} raced; {same} pick; {other.n_trainings} of {one.n_trainings} trainings"
        )


def main() -> None:
    """Print a row for each kind of field."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--fields", type=int, default=100, help="of each kind but null")
    parser.add_argument("--nulls", type=int, default=400)
    parser.add_argument("--most", type=int, default=FIXED, help="seeds of a finalist at most")
    parser.add_argument("--usual", type=int, default=FIXED, help="seeds for the pick at most")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--recorded", type=Path, nargs="+", help="folders of searches")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.recorded:
        replay(given.recorded, given.most, given.usual)
        return
    found = {}
    for kind in KINDS:
        n = given.nulls if kind == "null" else given.fields
        seeds = range(given.first_seed, given.first_seed + n)
        found[kind] = measured(kind, seeds, given.most, given.usual)
        print(kind, *(f"  {name}: {value:.3f}" for name, value in found[kind].items()), sep="\n")
    if given.output:
        given.output.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
