"""What recorded tables show: planted differences, single seeds, repeats, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import autopeft
from autopeft import cli
from autopeft.errors import UserError

_PR = [{"name": "lora-r64", "score": 0.699}, {"name": "dora-r64", "score": 0.740}]
"""peft PR 3341, on the 1,319 rows of GSM8K's test split."""
_RERUN = [{"name": "lora-r64", "score": 0.743}, {"name": "dora-r64", "score": 0.668}]
"""The same two in the stored results of the suite."""


@pytest.mark.parametrize("table", [_PR, _RERUN, _PR + _RERUN])
def test_single_seeds_and_their_rerun_name_no_winner(table: list[dict[str, Any]]) -> None:
    found = autopeft.compare_table(table, rows=1319)
    assert not any(pair.is_shown for pair in found.judgement.pairs)
    assert found.judgement.headline.startswith("Too close to call")
    assert "is the best" not in " ".join(found.verdict)


def test_a_single_seed_tells_how_little_seeds_would_have_to_differ() -> None:
    found = autopeft.compare_table(_PR, rows=1319)
    assert found.seed_sd is None
    (line,) = found.verdict
    limit = float(line.rsplit(maxsplit=1)[1])
    assert 0.004 < limit < 0.010, line
    (pair,) = found.judgement.pairs
    assert pair.found.low > 0, "by its rows alone it would be shown"
    for sd, is_shown in ((0.9 * limit, True), (1.1 * limit, False)):
        told = autopeft.compare_table(_PR, rows=1319, seed_sd=sd)
        assert told.judgement.pairs[0].is_shown == is_shown


def test_repeats_tell_the_spread_between_seeds() -> None:
    found = autopeft.compare_table(_PR + _RERUN, rows=1319)
    variances = [(0.743 - 0.699) ** 2 / 2, (0.740 - 0.668) ** 2 / 2]
    assert found.seed_sd == pytest.approx((sum(variances) / 2) ** 0.5)
    assert "from the repeats in the table (2 degrees of freedom)" in found.lines[1]
    assert found.judgement.order[0] == "lora-r64"


def test_a_planted_difference_is_shown_with_repeats_and_corrected_for_the_number() -> None:
    table = [
        {"name": name, "score": score + shift, "rows": 2000}
        for name, score in (("good", 0.9), ("bad", 0.6), ("worse", 0.5))
        for shift in (-0.005, 0.0, 0.005)
    ]
    found = autopeft.compare_table(table)
    assert all(pair.is_shown for pair in found.judgement.pairs)
    assert found.judgement.headline == (
        "good is the best: its score is higher than that of every other one."
    )
    two = [row for row in table if row["name"] != "worse"]
    narrow, wide = (
        next(p.found for p in autopeft.compare_table(t).judgement.pairs if p.better == "good")
        for t in (two, table)
    )
    assert narrow.gain == wide.gain


def test_what_is_too_close_tells_rows_and_seeds() -> None:
    table = [{"name": "a", "score": 0.71, "seeds": 3}, {"name": "b", "score": 0.70, "seeds": 3}]
    found = autopeft.compare_table(table, rows=500, seed_sd=0.01)
    assert " test rows, not 500" in found.verdict[0]
    assert " seeds each, not 3" in found.verdict[0]
    unknown = autopeft.compare_table(table, rows=500)
    assert "its lines are means" in unknown.lines[1]
    assert not unknown.judgement.pairs[0].is_shown


def test_scores_of_0_and_1_have_an_error_too() -> None:
    """Regression: their binomial error is 0, so two rows showed a difference."""
    for n_rows, high, low, is_shown in (
        (2, 1.0, 0.0, False),
        (6, 1.0, 0.5, False),
        (50, 1.0, 0.0, True),
        (60, 1.0, 0.5, True),
    ):
        table = [{"name": "a", "score": high}, {"name": "b", "score": low}]
        found = autopeft.compare_table(table, rows=n_rows, seed_sd=0.0)
        (pair,) = found.judgement.pairs
        assert pair.found.gain == high - low
        assert pair.found.error > 0
        assert pair.is_shown == is_shown, (n_rows, high, low)
        assert "not shown" in autopeft.compare_table(table, rows=n_rows).verdict[0] or not is_shown


def test_the_order_of_the_lines_changes_nothing() -> None:
    scores = {"a": 0.5, "b": 0.52, "c": 0.55, "d": 0.56, "e": 0.6225}
    table = [{"name": n, "score": s + i * 0.001} for n, s in scores.items() for i in range(2)]
    orders = (table, table[::-1], table[3:] + table[:3])
    told = [autopeft.compare_table(order, rows=1000) for order in orders]
    assert told[0].judgement == told[1].judgement == told[2].judgement
    assert told[0].verdict == told[1].verdict == told[2].verdict


def test_the_command_reads_csv_in_percent_and_writes(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("recipe,acc\nlora,69.9\ndora,74.0%\n", encoding="utf-8")
    words = ["--table", str(path), "--rows", "1319", "--columns", "name=recipe,score=acc"]
    words += ["--output", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, ["compare", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "dora over lora: +0.0410" in text
    assert "not shown" in text
    row = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert row["seed_sd"] is None
    assert row["pairs"][0]["is_shown"] is False


@pytest.mark.parametrize(
    ("written", "gain"),
    [
        (("70%", "0.743"), 0.043),
        (("70", "74.3%"), 0.043),
        (("0.5%", "0.9%"), 0.004),
        (("0.5 %", "74.3"), 0.738),
        (("0", "74.3"), 0.743),
        (("0.5", "0.9"), 0.4),
    ],
)
def test_a_percent_sign_is_a_hundredth_whatever_the_other_cells_hold(
    written: tuple[str, str], gain: float
) -> None:
    table = [{"name": name, "score": text} for name, text in zip("ab", written, strict=True)]
    (pair,) = autopeft.compare_table(table, rows=1319).judgement.pairs
    assert pair.better == "b"
    assert pair.found.gain == pytest.approx(gain)


def test_lines_of_one_name_with_unlike_rows_are_refused_in_any_order() -> None:
    table = [
        {"name": "a", "score": 0.9, "rows": 100_000},
        {"name": "a", "score": 0.5, "rows": 10},
        {"name": "b", "score": 0.7, "rows": 10},
    ]
    for lines in (table, table[::-1]):
        with pytest.raises(UserError, match=r"a has lines of .*; give them names of their own"):
            autopeft.compare_table(lines, seed_sd=0.0)
    apart = [{**row, "name": f"{row['name']} on {row['rows']}"} for row in table]
    assert len(autopeft.compare_table(apart, seed_sd=0.0).judgement.order) == 3


@pytest.mark.parametrize(
    ("table", "given", "problem"),
    [
        (_PR, {}, "does not tell its test rows; give --rows N"),
        (_PR, {"rows": 1}, "rows=1: must be a whole number from 2"),
        (_PR, {"rows": "100"}, "rows='100': must be a whole number"),
        (_PR, {"rows": 100, "seed_sd": -1.0}, "number with `0 <= seed_sd < 1` is needed"),
        (_PR, {"rows": 100, "seed_sd": "0.01"}, "seed_sd='0.01': a number with"),
        (_PR[:1], {"rows": 100}, "fewer than two names"),
        ([{"a": "x", "score": 0.5}], {"rows": 100}, "is recognized as what was trained"),
        ([*_PR, {"name": "c", "score": "high"}], {"rows": 100}, "is no number"),
        ([*_PR, {"name": "c", "score": None}], {"rows": 100}, "row 3 of .* has none"),
        ([*_PR, {"name": "c", "score": -2.0}], {"rows": 100}, "row 3 of .* holds -2.0, no share"),
        ([*_PR, {"name": "c", "score": "101%"}], {"rows": 100}, "row 3 of .* holds 101%, no share"),
        ([*_PR, {"name": "c", "score": 70}], {"rows": 100}, "row 1 .*; write 0.699% or 69.9%"),
        ([{**row, "rows": "50%"} for row in _PR], {}, "rows='rows': row 1 of .* is no number"),
        ([{**row, "rows": 1319.9} for row in _PR], {}, "row 1 of .* holds 1319.9, no whole number"),
        ([{**row, "rows": "1"} for row in _PR], {}, "holds 1, no whole number from 2"),
        ([{**row, "rows": 1e300} for row in _PR], {}, "rows='rows': row 1 .* no whole number"),
        ([{**row, "seeds": "1.9"} for row in _PR], {"rows": 100}, "holds 1.9, no whole number"),
        ([{**row, "seeds": 10**9} for row in _PR], {"rows": 100}, "whole number from 1 to 1,000"),
        ([*_PR, {"name": " ", "score": 0.7}], {"rows": 100}, "name='name': row 3 of .* has none"),
        ([*_PR, {"name": None, "score": 0.7}], {"rows": 100}, "name='name': row 3 of .* has none"),
        (_PR, {"rows": 100.5}, "rows=100.5: must be a whole number"),
        (_PR, {"rows": 100, "columns": {"skore": "x"}}, "has no such column"),
        ("nowhere.csv", {"rows": 100}, "table='nowhere.csv'"),
    ],
)
def test_a_mistake_is_one_line(table: Any, given: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        autopeft.compare_table(table, **given)
    assert len(str(caught.value).splitlines()) == 1
