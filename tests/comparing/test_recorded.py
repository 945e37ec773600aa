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
    ("table", "given", "problem"),
    [
        (_PR, {}, "does not tell its test rows; give --rows N"),
        (_PR, {"rows": 1}, "`rows >= 2` must hold"),
        (_PR, {"rows": 100, "seed_sd": -1.0}, "`0 <= seed_sd < 1` must hold"),
        (_PR[:1], {"rows": 100}, "fewer than two names"),
        ([{"a": "x", "score": 0.5}], {"rows": 100}, "is recognized as what was trained"),
        ([*_PR, {"name": "c", "score": "high"}], {"rows": 100}, "is no number"),
        ([*_PR, {"name": "c", "score": None}], {"rows": 100}, "line 3 of .* has none"),
        ([*_PR, {"name": "c", "score": -2.0}], {"rows": 100}, "below 0 or above 100"),
        (_PR, {"rows": 100, "columns": {"skore": "x"}}, "has no such column"),
        ("nowhere.csv", {"rows": 100}, "table='nowhere.csv'"),
    ],
)
def test_a_mistake_is_one_line(table: Any, given: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        autopeft.compare_table(table, **given)
    assert len(str(caught.value).splitlines()) == 1
