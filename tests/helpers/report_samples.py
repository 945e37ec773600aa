"""A made-up search with every kind of trial: seeded plain numbers, no model."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from hypothesis import strategies as st

from autopeft.confirm.finalists import Finalist, SeedScore
from autopeft.confirm.verdict import LevelVerdict, Verdict
from autopeft.costs import Price
from autopeft.costs.objectives import objective
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.reporting.record import AdapterScore, BudgetReport, SearchRecord
from autopeft.tasks.summary import DataSummary
from autopeft.trial import State, Trial

ROLES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
OBJECTIVES = (objective("accuracy"), objective("trainable_params"))
N_ROWS = 400


def lora(layers: range, rank: int, roles: tuple[str, ...] = ("attn.q", "attn.v")) -> AdapterPlan:
    return AdapterPlan(LayerSpec(layer, role, "lora", rank) for layer in layers for role in roles)


def candidate(plan: AdapterPlan, rate: float = 1e-3) -> Candidate:
    return Candidate(plan, TrainSettings(rate))


def price(plan: AdapterPlan) -> Price:
    n = 770 + sum({"ia3": 384, "norm": 768}.get(s.method, 768 * s.rank) for s in plan.specs)
    return Price(n, 4 * n, 1e12 + 3e6 * n, 300_000_000 + 16 * n)


def _quality(plan: AdapterPlan, rate: float) -> float:
    n = price(plan).trainable_params
    return 0.60 + 0.22 * (1 - math.exp(-n / 9000)) - 0.015 * abs(math.log10(rate / 3e-3))


def trial(
    number: int,
    chosen: Candidate,
    state: State = "complete",
    origin: str = "search",
    noise: float = 0,
) -> Trial:
    best = _quality(chosen.plan, chosen.train.learning_rate) + noise
    cost = price(chosen.plan)
    rungs = tuple((s, -0.69 + (best - 0.4) * (1 - math.exp(-s / 40))) for s in (11, 33, 100))
    n_rungs = {"complete": 3, "pruned": 1 + number % 2, "failed": 0}[state]
    values = {"accuracy": best, "trainable_params": cost.trainable_params}
    return Trial(
        number,
        chosen,
        cost,
        origin,
        state,
        values if state == "complete" else {},
        rungs[:n_rungs],
        {"complete": "", "pruned": "gap at a rung", "failed": "loss is NaN\nat step 12"}[state],
        {"train_seconds": 4.0 + number / 10} if state == "complete" else {},
    )


def finalist(of: Trial, seeds: int = 3, shift: float = 0.0, n_rows: int = N_ROWS) -> Finalist:
    lines = []
    for seed in range(seeds):
        wanted = of.values["accuracy"] + shift + 0.004 * (seed - 1)
        right = max(0, min(n_rows, round(wanted * n_rows)))
        rows = tuple(1.0 if (i * 7 + seed * 11) % n_rows < right else 0.0 for i in range(n_rows))
        quality = sum(rows) / n_rows
        lines.append(
            SeedScore(
                seed,
                {"accuracy": wanted + 0.002, "loss": 1.1 - wanted},
                {"accuracy": quality, "loss": 1.1 - quality},
                rows,
                {"accuracy": quality, "trainable_params": of.costs.trainable_params},
            )
        )
    return Finalist(of.candidate, of.costs, of.origin, tuple(lines))


def _mixed(rng: random.Random) -> AdapterPlan:
    specs = []
    first = rng.randrange(6)
    method = rng.choice(["lora", "lora", "dora", "oft", "miss"])
    for layer in range(first, 6):
        for role in rng.sample(ROLES, rng.randint(1, 4)):
            specs.append(LayerSpec(layer, role, method, rng.choice([1, 2, 4, 8])))
    taken = {(s.layer, s.role) for s in specs}
    for layer in range(first):
        for role in ("attn.k", "mlp.down"):
            if (layer, role) not in taken and rng.random() < 0.5:
                specs.append(LayerSpec(layer, role, "ia3"))
    return AdapterPlan(specs)


def make_record(n_trials: int = 45, seed: int = 0) -> SearchRecord:
    """A finished run: reference, LoRA baselines, searched trials, six finalists, a verdict."""
    rng = random.Random(seed)
    trials = [trial(0, candidate(AdapterPlan()), origin="reference")]
    for rank in (2, 8):
        for rate in (1e-3, 3e-3, 1e-2):
            chosen = candidate(lora(range(6), rank), rate)
            trials.append(trial(len(trials), chosen, origin="baseline"))
    while len(trials) < n_trials:
        number = len(trials)
        chosen = candidate(_mixed(rng), float(f"{10 ** rng.uniform(-3.5, -1.7):.3g}"))
        state: State = "failed" if number % 19 == 0 else "pruned" if number % 3 == 0 else "complete"
        trials.append(trial(number, chosen, state, noise=rng.gauss(0, 0.012)))
    front: list[Trial] = []
    complete = [o for o in trials if o.state == "complete"]
    for one in sorted(complete, key=lambda o: (o.costs.trainable_params, -o.values["accuracy"])):
        if not front or one.values["accuracy"] > front[-1].values["accuracy"]:
            front.append(one)
    tuned = max((o for o in complete if o.origin == "baseline"), key=lambda o: o.values["accuracy"])
    chosen_ones = {o.number: o for o in [trials[0], tuned, *front[1:][:7]]}
    finalists = tuple(
        finalist(o, shift=rng.gauss(0, 0.006)) for o in chosen_ones.values() if o.number != 0
    )
    scores = {
        f.candidate.digest: AdapterScore(0, "test", dict(f.seeds[0].test), N_ROWS)
        for f in finalists
    }
    levels = tuple(
        LevelVerdict(
            f.candidate.digest,
            "ties",
            f.mean("accuracy") - 0.8,
            (f.mean("accuracy") - 0.83, f.mean("accuracy") - 0.77),
            f.costs.trainable_params / tuned.costs.trainable_params,
        )
        for f in finalists
        if f.candidate.digest != tuned.candidate.digest
    )
    text = (
        "No: LoRA is as good. The best member reaches the tuned LoRA's accuracy with 4.1x fewer "
        "parameters, and no member beats it by more than the noise of 3 seeds."
    )
    return SearchRecord(
        settings={
            "model": "models/minilm",
            "data": "data/snippets.csv",
            "task": "text-classification",
            "objectives": ["trainable_params"],
            "budget": "10m",
            "steps": 100,
            "batch_size": 16,
            "rungs": 3,
            "eta": 3,
            "max_length": 128,
            "seed": 0,
            "space": "default",
            "precision": "auto",
            "test": None,
        },
        objectives=OBJECTIVES,
        trials=tuple(trials),
        finalists=finalists,
        front=tuple(o.candidate.digest for o in front),
        baseline=tuned.candidate.digest,
        reference=trials[0].candidate.digest,
        verdict=Verdict(False, text, levels),
        budget=BudgetReport(
            "10m",
            587.3,
            4.2e14,
            len(trials),
            {
                "startup": 21.0,
                "pricing": 6.2,
                "search": 372.1,
                "confirmation": 180.4,
                "report": 7.6,
            },
            {"train": 702.0, "evaluate": 231.0, "attach": 31.0, "idle": 90.0},
        ),
        adapter_scores=scores,
        data=DataSummary(
            {"train": 2000, "validation": 1000, "test": N_ROWS},
            3,
            ("negative", "positive"),
            "9f2c11",
            task="text-classification",
            columns={"text": "review", "label": "stars"},
            sources={"train": "reviews.csv", "validation": "reviews.csv", "test": "reviews.csv"},
            dropped={"the text is missing": 3},
            n_duplicates=7,
            n_cut=11,
            max_length=64,
            available={"validation": 5000},
            notes=("reviews.csv: separator ';'",),
        ),
        versions={"autopeft": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
        warnings=("3 rows without text were dropped",),
        started="2026-11-24T06:00:00+00:00",
        ended="2026-11-24T06:09:47+00:00",
    )


def interrupted(record: SearchRecord) -> SearchRecord:
    """The same run, stopped before confirmation."""
    return replace(record, finalists=(), adapter_scores={}, verdict=None, is_complete=False)


NUMBERS = st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.5, math.nan]))


@st.composite
def records(draw: st.DrawFn) -> SearchRecord:
    """Runs with any mix of states, repeated values, NaN, and none to five finalists."""
    plans = [AdapterPlan(), *(lora(range(layer, 3), rank) for layer in range(3) for rank in (1, 2))]
    trials = []
    for number, plan in enumerate(draw(st.lists(st.sampled_from(plans), unique=True, max_size=7))):
        state: State = draw(st.sampled_from(["complete", "complete", "pruned", "failed"]))
        made = trial(number, candidate(plan), state)
        if state == "complete":
            made = replace(made, values={**made.values, "accuracy": draw(NUMBERS)})
        trials.append(made)
    complete = [o for o in trials if o.state == "complete"]
    able = [o for o in complete if not math.isnan(o.values["accuracy"])]
    confirmed = able[: draw(st.integers(0, 5))]
    seeds = draw(st.integers(1, 3))
    digests = [o.candidate.digest for o in complete]
    pick = st.sampled_from([*digests, None])
    return replace(
        make_record(8),
        trials=tuple(trials),
        finalists=tuple(finalist(o, seeds, n_rows=20) for o in confirmed),
        front=tuple(digests),
        baseline=draw(pick),
        reference=draw(pick),
        adapter_scores={
            o.candidate.digest: AdapterScore(0, "test", {"accuracy": 0.5}, 20) for o in confirmed
        },
    )


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\n| `# *x* $y_1$ & \ud800"


def hostile() -> SearchRecord:
    """A run whose every free text tries to break out of its place."""
    record = make_record(20)
    assert record.verdict is not None
    trials = tuple(
        replace(o, reason=HOSTILE if o.state != "complete" else "") for o in record.trials
    )
    return replace(
        record,
        settings={"model": HOSTILE, "task": HOSTILE, HOSTILE: [HOSTILE]},
        trials=trials,
        verdict=replace(record.verdict, text=HOSTILE),
        budget=replace(record.budget, limit=HOSTILE),
        data=DataSummary({HOSTILE: 3}, 0, (HOSTILE,), HOSTILE),
        versions={HOSTILE: HOSTILE},
        warnings=(HOSTILE,),
        started=HOSTILE,
    )
