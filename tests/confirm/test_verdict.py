"""Tests of the verdict: it must say yes to a real gain and no to luck."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from autopeft.confirm.finalists import Finalist, SeedScore
from autopeft.confirm.pick import pick_best
from autopeft.confirm.power import Power, shown_power
from autopeft.confirm.verdict import UntriedLora, judge
from autopeft.costs import Price
from autopeft.costs.objectives import Objective, objective
from autopeft.errors import SettingsError
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings

OBJECTIVES = (Objective("accuracy", "maximize", bounds=(0.0, 1.0)), objective("trainable_params"))


def finalist(
    rng: np.random.Generator,
    number: int,
    quality: float,
    cost: int,
    *,
    origin: str = "search",
    n_seeds: int = 3,
    hardness: np.ndarray | None = None,
    n_rows: int = 1500,
) -> Finalist:
    """Test rows are right with probability `quality`, correlated over finalists."""
    method = "lora" if origin == "baseline" else "miss"
    plan = AdapterPlan(
        () if origin == "reference" else [LayerSpec(0, "attn.q", method, number + 1)]
    )
    n_rows = n_rows if hardness is None else len(hardness)
    seeds = []
    for seed in range(n_seeds):
        luck = rng.normal(0, 0.004)
        ease = hardness if hardness is not None else rng.random(n_rows)
        flips = rng.random(n_rows) < 0.06
        rows = np.where(flips, rng.random(n_rows) < quality, ease < quality + luck)
        score = float(rows.mean())
        validation = quality + luck + rng.normal(0, 0.006)
        seeds.append(
            SeedScore(
                seed,
                {"accuracy": validation},
                {"accuracy": score},
                tuple(map(float, rows)),
                {"accuracy": score, "trainable_params": cost},
            )
        )
    return Finalist(
        Candidate(plan, TrainSettings(1e-3)), Price(cost, 4 * cost, 1.0, 1), origin, tuple(seeds)
    )


def field(
    seed: int,
    lora: float,
    members: Sequence[tuple[float, int]],
    reference: float = 0.55,
    small: int = 1_000,
    n_rows: int = 1500,
) -> list[Finalist]:
    """Finalists: the tuned LoRA, a small LoRA, the reference, and members (quality, cost)."""
    rng = np.random.default_rng(seed)
    hardness = rng.random(n_rows)
    rows = [
        finalist(rng, 0, lora, 10_000, origin="baseline", hardness=hardness),
        finalist(rng, 1, lora - 0.04, small, origin="baseline", hardness=hardness),
        finalist(rng, 2, reference, 100, origin="reference", hardness=hardness),
    ]
    for number, (quality, cost) in enumerate(members, start=3):
        rows.append(finalist(rng, number, quality, cost, hardness=hardness))
    return rows


def test_a_clearly_better_member_at_no_more_cost_wins() -> None:
    verdict = judge(field(0, 0.80, [(0.88, 9_000), (0.70, 500)], small=9_500), OBJECTIVES)
    assert verdict.beats_lora
    assert verdict.text.startswith("Yes: ")
    assert [level.result for level in verdict.levels] == ["wins", "loses"]
    low, high = verdict.levels[0].gain_ci
    assert 0 < low < verdict.levels[0].gain < high
    assert verdict.levels[0].cost_ratio == pytest.approx(0.9)


def test_a_member_as_good_at_a_fraction_of_the_cost_wins() -> None:
    verdict = judge(field(1, 0.85, [(0.855, 2_000)], n_rows=6_000), OBJECTIVES)
    assert verdict.beats_lora
    assert "as good as" in verdict.text or "better than" in verdict.text


@pytest.mark.parametrize("lora", [0.65, 0.90])
def test_of_equal_members_the_cheapest_is_named(lora: float) -> None:
    rows = field(1, lora, [(0.90, 4_000), (0.90, 2_000)])
    rows[-1] = replace(rows[-1], seeds=rows[-2].seeds)
    verdict = judge(rows, OBJECTIVES)
    assert rows[-1].digest[:8] in verdict.text


def test_being_better_at_more_cost_is_no_win() -> None:
    verdict = judge(field(2, 0.80, [(0.86, 30_000)]), OBJECTIVES)
    assert not verdict.beats_lora
    assert verdict.levels[0].result == "wins"


def test_a_cheap_member_is_no_win_where_a_lora_of_that_cost_is_as_good() -> None:
    rows = field(3, 0.80, [(0.80, 2_000)])
    rng = np.random.default_rng(9)
    rows[1] = finalist(rng, 1, 0.80, 1_000, origin="baseline", hardness=rng.random(1500))
    assert not judge(rows, OBJECTIVES).beats_lora


def test_equal_quality_is_no_win_and_says_lora_is_as_good() -> None:
    verdict = judge(field(4, 0.80, [(0.80, 9_000), (0.79, 8_000)]), OBJECTIVES)
    assert (verdict.answer, verdict.beats_lora) == ("no", False)
    assert verdict.text.startswith("No: LoRA is as good, within 0.025. ")


def test_the_rows_and_the_seeds_that_it_takes_are_told_apart() -> None:
    text = shown_power(Power(0.01, 0.1, 143, 2, 1600, 12))
    assert text.endswith("1,600 test rows, not 143, and 12 seeds (confirm_seeds), not 2.")


def test_seeds_that_nobody_trains_are_no_remedy() -> None:
    text = shown_power(Power(0.01, 0.1, 143, 2, 1600, 220))
    assert "1,600 test rows, not 143, and more seeds (confirm_seeds) than a budget" in text
    assert "220" not in text


def test_what_few_rows_cannot_tell_is_undecided_and_says_what_would() -> None:
    few = judge(field(4, 0.80, [(0.80, 9_000)], n_rows=150), OBJECTIVES)
    assert (few.answer, few.beats_lora) == ("undecided", False)
    power = few.power
    assert power.detectable > power.margin > 0
    assert (power.n_rows, power.n_seeds) == (150, 3)
    assert power.rows_needed > 150
    assert f"{power.margin:.2g} takes about" in few.text
    assert "test rows, not 150" in few.text
    # With what it asks for, the run can tell.
    enough = judge(field(4, 0.80, [(0.80, 9_000)], n_rows=power.rows_needed), OBJECTIVES)
    assert enough.answer == "no"


def test_a_detectable_difference_is_found_as_often_as_it_says() -> None:
    small = {"small": 9_500, "n_rows": 300}
    nulls = [judge(field(n, 0.70, [(0.70, 9_000)], **small), OBJECTIVES) for n in range(10)]
    true_gain = float(np.mean([null.power.detectable for null in nulls]))
    answers = [
        judge(field(seed, 0.70, [(0.70 + true_gain, 9_000)], **small), OBJECTIVES).answer
        for seed in range(40)
    ]
    assert 0.6 <= np.mean([answer == "yes" for answer in answers]) <= 0.97
    assert "no" not in answers


def test_a_search_without_a_proposal_claims_nothing() -> None:
    few = field(4, 0.80, [(0.80, 9_000)], n_rows=150)
    assert "nothing is shown to beat" in judge(few, OBJECTIVES, n_proposals=0).text
    for rows in (few, field(0, 0.80, [(0.88, 9_000)]), field(4, 0.80, [(0.80, 9_000)])):
        verdict = judge(rows, OBJECTIVES, n_proposals=0)
        assert (verdict.answer, verdict.beats_lora) == ("undecided", False)
        assert verdict.text.startswith("Undecided: the searcher made no proposal of its own")
        assert verdict.text.count("Undecided") == 1
        assert not {"Yes:", "No:"} & set(verdict.text.split())
        assert rows is few or judge(rows, OBJECTIVES, n_proposals=1).answer != "undecided"


def test_one_seed_tells_nothing_of_the_next() -> None:
    rows = [replace(f, seeds=f.seeds[:1]) for f in field(0, 0.80, [(0.88, 9_000)])]
    verdict = judge(rows, OBJECTIVES)
    assert verdict.answer == "undecided"
    assert "one seed" in verdict.text


def test_members_that_cost_more_are_no_reason_to_leave_lora() -> None:
    verdict = judge(field(2, 0.80, [(0.86, 30_000)]), OBJECTIVES)
    assert verdict.answer == "no"
    assert "all other members cost more" in verdict.text


def test_where_nothing_can_be_learned_the_answer_is_no_nearly_always() -> None:
    answers = []
    for seed in range(60):
        members = [(0.5, int(cost)) for cost in np.geomspace(200, 9_000, 6)]
        rows = field(seed, 0.5, members, reference=0.5)
        rng = np.random.default_rng(1000 + seed)
        rows[1] = finalist(rng, 1, 0.5, 1_000, origin="baseline")
        answers.append(judge(rows, OBJECTIVES).beats_lora)
    assert np.mean(answers) <= 0.1


def test_luck_among_many_members_is_corrected_for() -> None:
    wins = 0
    for seed in range(40):
        rows = field(seed, 0.80, [(0.80, 9_000 - 100 * k) for k in range(8)], small=9_500)
        wins += any(level.result == "wins" for level in judge(rows, OBJECTIVES).levels)
    assert wins <= 5


def test_without_baselines_or_members_there_is_no_yes() -> None:
    rows = field(0, 0.8, [(0.9, 10)])
    assert not judge([f for f in rows if f.origin != "baseline"], OBJECTIVES).beats_lora
    assert not judge(rows[:3], OBJECTIVES).beats_lora
    assert not judge([], OBJECTIVES).beats_lora


def without_rows(finalists: Sequence[Finalist], *, n_seeds: int = 3) -> list[Finalist]:
    """What a training function of the user's gives that scores no single rows."""

    def bare(score: SeedScore) -> SeedScore:
        return replace(score, test_rows=(), is_held_out=False)

    return [replace(f, seeds=tuple(map(bare, f.seeds[:n_seeds]))) for f in finalists]


def test_without_rows_the_seeds_alone_tell_the_error() -> None:
    clear = judge(without_rows(field(0, 0.70, [(0.80, 5_000)])), OBJECTIVES)
    assert clear.beats_lora
    assert "on the rows that the search selected by" in clear.text
    one = judge(without_rows(field(0, 0.70, [(0.80, 5_000)]), n_seeds=1), OBJECTIVES)
    assert not one.beats_lora
    assert one.text.startswith("Undecided: each finalist has one seed")


def test_without_rows_luck_of_seeds_is_no_gain() -> None:
    wins = [
        judge(without_rows(field(seed, 0.7, [(0.7, 9_000)] * 3, small=9_500)), OBJECTIVES)
        for seed in range(40)
    ]
    assert sum(verdict.beats_lora for verdict in wins) <= 4


def test_picks() -> None:
    rows = field(5, 0.80, [(0.83, 9_000), (0.828, 3_000), (0.60, 400)])
    digests = [f.candidate.digest for f in rows]
    assert pick_best(rows, OBJECTIVES, rule="best_quality") in digests[3:5]
    assert pick_best(rows, OBJECTIVES, rule="one_se") == digests[4]
    assert pick_best(rows, OBJECTIVES, rule="knee") in digests
    assert pick_best([], OBJECTIVES) is None
    assert pick_best(rows[2:3], OBJECTIVES) == digests[2]
    assert pick_best(rows, OBJECTIVES[:1], rule="one_se") in digests[3:5]
    limit = sorted(row.costs.trainable_params for row in rows)[1]
    kept = [r for r in rows if r.costs.trainable_params <= limit]
    best = max(kept, key=lambda r: r.mean("accuracy", "validation"))
    assert pick_best(rows, OBJECTIVES, rule=f"trainable_params<={limit}") == best.candidate.digest
    assert pick_best(rows, OBJECTIVES, rule="trainable_params<=1") is None
    for wrong in ("cheapest", "params<=3", "trainable_params<=lots"):
        with pytest.raises(SettingsError, match="pick="):
            pick_best(rows, OBJECTIVES, rule=wrong)
    with pytest.raises(SettingsError, match="pick"):
        pick_best(rows, OBJECTIVES, rule="cheapest")


def test_a_pick_within_a_limit_on_what_is_measured() -> None:
    rows = field(5, 0.80, [(0.83, 9_000), (0.828, 3_000), (0.60, 400)])[:3]
    timed = [
        replace(row, seeds=tuple(replace(s, further={"latency_ms": 1.0 + i}) for s in row.seeds))
        for i, row in enumerate(rows)
    ]
    best = max(timed[:2], key=lambda row: row.mean("accuracy", "validation"))
    assert pick_best(timed, OBJECTIVES, rule="latency_ms<=2.5") == best.digest
    assert pick_best(timed, OBJECTIVES, rule="latency_ms<=0.1") is None
    assert pick_best(rows, OBJECTIVES, rule="latency_ms<=9") is None


def test_the_pick_by_perplexity_takes_errors_and_scores_alike() -> None:
    """Its errors are those of the loss: 0.1 of it is no tenth of a perplexity of 50."""
    perplexity = Objective("perplexity", "minimize", bounds=(1.0, np.inf))
    rng = np.random.default_rng(0)

    def scored(one: Finalist, loss: float) -> Finalist:
        score = {"perplexity": float(np.exp(loss))}
        draws = tuple(map(float, -loss + 0.1 * rng.standard_normal(1000)))
        seeds = (SeedScore(0, score, score, (-loss,) * 40, {}, draws),)
        return replace(one, seeds=seeds)

    large, small = field(5, 0.80, [(0.83, 9_000), (0.828, 3_000)])[3:5]
    objectives = (perplexity, OBJECTIVES[1])
    best = scored(large, np.log(50.0))
    assert pick_best([best, scored(small, np.log(52.0))], objectives) == small.digest
    assert pick_best([best, scored(small, np.log(60.0))], objectives) == large.digest


def with_draws(finalists: Sequence[Finalist], n_draws: int = 1500) -> list[Finalist]:
    """The same finalists, whose quality is given on resamples of the rows instead of by row."""
    n_rows = len(finalists[0].seeds[0].test_rows)
    rng = np.random.default_rng(7)
    resamples = [rng.integers(n_rows, size=n_rows) for _ in range(n_draws)]
    changed = []
    for one in finalists:
        seeds = []
        for seed in one.seeds:
            rows = np.asarray(seed.test_rows)
            draws = tuple(float(rows[index].mean()) for index in resamples)
            # What the rows hold has no part in the verdict then.
            seeds.append(replace(seed, test_rows=tuple(-rows), test_draws=draws))
        changed.append(replace(one, seeds=tuple(seeds)))
    return changed


def test_a_metric_on_resamples_is_judged_as_one_by_row() -> None:
    finalists = field(3, 0.75, [(0.81, 9_000), (0.752, 9_000), (0.60, 8_000)])
    by_row, by_draw = judge(finalists, OBJECTIVES), judge(with_draws(finalists), OBJECTIVES)
    assert by_draw.beats_lora == by_row.beats_lora is True
    for mine, other in zip(by_draw.levels, by_row.levels, strict=True):
        assert (mine.result, mine.against) == (other.result, other.against)
        assert mine.gain == pytest.approx(other.gain, abs=1e-12)
        assert mine.gain_ci == pytest.approx(other.gain_ci, abs=0.006)


def test_resamples_of_equal_candidates_show_no_difference() -> None:
    for seed in range(5):
        finalists = with_draws(field(seed, 0.75, [(0.75, 11_000), (0.75, 12_000)]), 500)
        assert all(level.result == "ties" for level in judge(finalists, OBJECTIVES).levels)


def test_a_lora_that_was_not_tuned_to_the_end_leaves_a_yes_undecided() -> None:
    rows = field(0, 0.80, [(0.88, 5_000)])
    asked: list[float] = []

    def untried(chance: float | None) -> Callable[[float], UntriedLora | None]:
        def of(gain: float) -> UntriedLora | None:
            asked.append(gain)
            return None if chance is None else UntriedLora(3, chance)

        return of

    for chance in (None, 0.3):
        verdict = judge(rows, OBJECTIVES, untried=untried(chance))
        assert verdict == judge(rows, OBJECTIVES)
        assert verdict.answer == "yes"
    verdict = judge(rows, OBJECTIVES, untried=untried(0.8))
    assert (verdict.answer, verdict.beats_lora) == ("undecided", False)
    assert verdict.text.startswith("Undecided: LoRA itself was not tuned to the end. After 3 bas")
    assert "chance of 80%" in verdict.text
    assert asked == [pytest.approx(0.08, abs=0.02)] * 3
    # What is not a yes is not asked about.
    assert judge(field(0, 0.80, [(0.80, 20_000)]), OBJECTIVES, untried=untried(0.8)).answer != "yes"
    assert len(asked) == 3


def test_a_verdict_says_which_lora_its_member_was_cut_from() -> None:
    tuned, *others, member = field(0, 0.80, [(0.80, 2_000)])
    source = tuned.digest
    cut = replace(member, origin="compressed", compressed_from=source)
    verdict = judge([tuned, *others, cut], OBJECTIVES)
    assert verdict.answer == "yes"
    name = f"Yes: miss {cut.digest[:8]}"
    assert verdict.text.startswith(f"{name}, cut from the tuned LoRA, is as good")
    other = judge([tuned, *others, replace(cut, compressed_from="0" * 16)], OBJECTIVES)
    assert other.text.startswith(f"{name}, cut from 00000000, is as good")
    dear = replace(cut, costs=replace(cut.costs, trainable_params=20_000))
    no = judge([tuned, *others, dear], OBJECTIVES)
    assert f"(miss {cut.digest[:8]}, cut from the tuned LoRA) has" in no.text
