"""Which candidates are confirmed, in which order, and where each confirmation is kept on disk."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from autopeft.engine.jobs import Compressed, Job
from autopeft.outcome import Finalist, Objective, Outcome, SeedScore
from autopeft.plan import AdapterPlan, Candidate
from autopeft.pricing import Price
from autopeft.search.front import front_of

_ORIGIN = "compressed.json"
"""Beside a score: what it was cut from, where it was not trained."""


def spread(
    front: Sequence[Outcome], objectives: Sequence[Objective], n_members: int
) -> list[Outcome]:
    """At most `n_members` of a front: both ends, and between them even steps of log cost."""
    if len(front) <= n_members:
        return list(front)
    cost = objectives[1].name
    logs = [math.log(max(outcome.objectives[cost], 1e-12)) for outcome in front]
    picks: list[int] = [len(front) - 1]
    for i in range(n_members - 1):
        target = logs[0] + (logs[-1] - logs[0]) * i / (n_members - 1)
        free = [k for k in range(len(front)) if k not in picks]
        picks.append(min(free, key=lambda k: abs(logs[k] - target)))
    return [front[k] for k in sorted(picks)]


def as_lora_baselines(outcomes: Sequence[Outcome]) -> tuple[Outcome, ...]:
    """The outcomes, every ordinary LoRA among them marked as a baseline, whoever proposed it.

    A LoRA of one rank on the same modules of every layer is what a user would write by hand. If the
    search finds a better one than the baseline grid holds, then that is the tuned LoRA, and no
    proof that something else beats LoRA.
    """
    layers = {
        frozenset(spec.layer for spec in outcome.candidate.plan.specs)
        for outcome in outcomes
        if outcome.origin == "baseline"
    }
    return tuple(
        replace(outcome, origin="baseline") if _is_ordinary_lora(outcome, layers) else outcome
        for outcome in outcomes
    )


def _is_ordinary_lora(outcome: Outcome, layers: Collection[frozenset[int]]) -> bool:
    specs = outcome.candidate.plan.specs
    roles: dict[int, set[str]] = {}
    for spec in specs:
        roles.setdefault(spec.layer, set()).add(spec.role)
    first = next(iter(roles.values()), set())
    return (
        frozenset(roles) in layers
        and outcome.candidate.plan.methods == ("lora",)
        and len({spec.rank for spec in specs}) == 1
        and all(found == first for found in roles.values())
    )


@dataclass(frozen=True)
class Nomination:
    """A candidate to confirm and the outcome that earned it.

    Attributes:
        outcome: Its trial.
        seconds: What one retraining will take, judging by the trial.
        scoring_seconds: What of that goes into scoring it.
    """

    outcome: Outcome
    seconds: float
    scoring_seconds: float = 0.0


def nominate(
    outcomes: Sequence[Outcome],
    objectives: Sequence[Objective],
    *,
    max_finalists: int,
    test_share: float,
) -> tuple[Nomination, ...]:
    """The candidates worth confirming: tuned LoRAs, the reference, the front.

    Chosen on validation alone. The best baseline and the cheapest baseline on the baselines' own
    front come first, since no verdict can do without them; then the reference (no adapter); then
    the front, thinned to `max_finalists` evenly along the cost axis if it has more members.

    Args:
        outcomes: All outcomes of the search.
        objectives: Quality first.
        max_finalists: Most front members to take.
        test_share: Time to score the test split over time to score the validation split.
    """
    complete = [o for o in as_lora_baselines(outcomes) if o.state == "complete"]
    baselines = front_of([o for o in complete if o.origin == "baseline"], objectives)
    chosen: dict[str, Outcome] = {}
    if baselines:
        quality = objectives[0]
        best = max(baselines, key=lambda o: quality.sign() * o.objectives[quality.name])
        chosen[best.candidate.digest] = best
        chosen[baselines[0].candidate.digest] = baselines[0]
    for outcome in complete:
        if outcome.origin == "reference":
            chosen[outcome.candidate.digest] = outcome
    # The empty plan is no adapter: it neither takes a finalist's place nor beats one.
    adapters = [o for o in complete if o.candidate.plan.specs]
    for outcome in spread(front_of(adapters, objectives), objectives, max_finalists):
        chosen.setdefault(outcome.candidate.digest, outcome)
    return tuple(_nomination(outcome, test_share) for outcome in chosen.values())


def _nomination(outcome: Outcome, test_share: float) -> Nomination:
    scoring = outcome.measured.get("validation_seconds", 0.0) * (1.0 + test_share)
    return Nomination(outcome, outcome.measured.get("train_seconds", 0.0) + scoring, scoring)


_COMPRESSIBLE = frozenset({"lora", "rslora"})
"""Methods of which a lower rank can be cut."""


def lower_ranks(candidate: Candidate) -> tuple[Candidate, ...]:
    """A LoRA's half, quarter and eighth ranks (1 at least); () for whatever is not all LoRA."""
    plan = candidate.plan
    if not plan.specs or not _COMPRESSIBLE.issuperset(plan.methods):
        return ()
    found = []
    for divisor in (2, 4, 8):
        if max(spec.rank for spec in plan.specs) >= divisor:
            specs = (replace(spec, rank=max(1, spec.rank // divisor)) for spec in plan.specs)
            found.append(Candidate(AdapterPlan(specs), candidate.train))
    return tuple(found)


def confirmation_jobs(
    nominations: Sequence[Nomination],
    *,
    first_seed: int,
    n_seeds: int,
    done: frozenset[tuple[str, int]],
    lower_ranks: Mapping[str, tuple[Candidate, ...]] = MappingProxyType({}),
) -> tuple[Job, ...]:
    """One job a nomination and seed, seed by seed, so that a cut leaves equal numbers of seeds.

    The seeds differ from the search's own: a candidate that won by a lucky seed must win again.
    """
    return tuple(
        Job(
            "confirm",
            nomination.outcome.candidate,
            seed,
            lower_ranks=lower_ranks.get(nomination.outcome.candidate.digest, ()),
        )
        for seed in range(first_seed, first_seed + n_seeds)
        for nomination in nominations
        if (nomination.outcome.candidate.digest, seed) not in done
    )


class ConfirmationStore:
    """Confirmations on disk, one folder each, so that an interrupted run loses none.

    Args:
        folder: The run's output folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "confirm"
        self._cuts = folder / "confirm" / "cut"
        self._adapters = folder / "adapters"

    def _place(self, digest: str, seed: int, *, is_cut: bool = False) -> Path:
        # A candidate may be cut from another first and trained itself in a later sitting.
        return (self._cuts if is_cut else self._folder) / f"{digest}-seed{seed}"

    def save(self, candidate: Candidate, score: SeedScore, files: Mapping[str, bytes]) -> None:
        """Writes one confirmation; it is there whole or not at all."""
        self._write(self._place(candidate.digest, score.seed), score, files)

    def save_compressed(self, made: Compressed, source: Candidate) -> None:
        """Writes what was cut from a confirmation of `source`."""
        origin = {
            "candidate": made.candidate.to_json(),
            "price": made.price.to_json(),
            "compressed_from": source.digest,
        }
        place = self._place(made.candidate.digest, made.score.seed, is_cut=True)
        self._write(place, made.score, made.files, origin)

    @staticmethod
    def _write(
        place: Path,
        score: SeedScore,
        files: Mapping[str, bytes],
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        draft = place.with_name(f".{place.name}.{os.getpid()}")
        for name, content in files.items():
            path = draft / "adapter" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (draft / "score.json").write_text(json.dumps(asdict(score)))
        if origin is not None:
            (draft / _ORIGIN).write_text(json.dumps(origin))
        if place.exists():
            shutil.rmtree(place)
        draft.rename(place)

    def scores(self) -> dict[str, tuple[SeedScore, ...]]:
        """All confirmations by candidate digest, in order of their seeds.

        Those of a candidate that was cut from another are left out once it was trained itself.
        """
        return self._scores_in(self._cuts) | self._scores_in(self._folder)

    @staticmethod
    def _scores_in(folder: Path) -> dict[str, tuple[SeedScore, ...]]:
        found: dict[str, list[SeedScore]] = {}
        for path in sorted(folder.glob("[!.]*-seed*/score.json")):
            row = json.loads(path.read_text())
            digest = path.parent.name.rsplit("-seed", 1)[0]
            score = SeedScore(**{**row, "test_rows": tuple(row["test_rows"])})
            found.setdefault(digest, []).append(score)
        return {digest: tuple(sorted(s, key=lambda s: s.seed)) for digest, s in found.items()}

    def compressed(self) -> dict[str, tuple[Candidate, Price, str]]:
        """What was cut from others and never trained itself, by digest.

        Candidate, price, and digest of what it was cut from.
        """
        trained = {digest for digest, _ in self.done()}
        found = {}
        for path in sorted(self._cuts.glob(f"[!.]*-seed*/{_ORIGIN}")):
            row = json.loads(path.read_text())
            candidate = Candidate.from_json(row["candidate"])
            if candidate.digest not in trained:
                found[candidate.digest] = candidate, Price(**row["price"]), row["compressed_from"]
        return found

    def done(self) -> frozenset[tuple[str, int]]:
        """(digest, seed) of every retraining kept."""
        pairs = (path.name.rsplit("-seed", 1) for path in self._folder.glob("[!.]*-seed*"))
        return frozenset((digest, int(seed)) for digest, seed in pairs)

    def publish(self, finalist: Finalist, seed: int) -> Path:
        """Copies the adapter of one seed to `adapters/<digest>` and returns that folder."""
        digest = finalist.candidate.digest
        target = self._adapters / digest
        draft = target.with_name(f".{digest}.{os.getpid()}")
        if draft.exists():
            shutil.rmtree(draft)
        place = self._place(digest, seed, is_cut=bool(finalist.compressed_from))
        shutil.copytree(place / "adapter", draft)
        if target.exists():
            shutil.rmtree(target)
        draft.rename(target)
        return target


def finalists(
    outcomes: Sequence[Outcome],
    scores: Mapping[str, tuple[SeedScore, ...]],
    compressed: Mapping[str, tuple[Candidate, Price, str]] = MappingProxyType({}),
) -> tuple[Finalist, ...]:
    """The confirmed candidates, in the order of their trials, then what was cut from them."""
    kept: dict[str, Finalist] = {}
    for outcome in as_lora_baselines(outcomes):
        digest = outcome.candidate.digest
        is_confirmed = digest in scores and digest not in compressed
        if is_confirmed and digest not in kept and outcome.state == "complete":
            kept[digest] = Finalist(
                outcome.candidate, outcome.price, outcome.origin, scores[digest]
            )
    for digest, (candidate, price, source) in compressed.items():
        if source in kept:
            kept[digest] = Finalist(candidate, price, "compressed", scores[digest], source)
    return tuple(kept.values())
