import io
from collections.abc import Sequence
from dataclasses import replace

import pytest
from report_samples import hostile, interrupted, make_record
from rich.console import Console

from autopeft.costs.objectives import Objective, objective
from autopeft.reporting.columns import facts, front_columns, rows_of
from autopeft.reporting.front_view import FrontEntry, FrontView, view
from autopeft.reporting.tables import budget_table, summary


def text_of(thing: object, width: int = 80) -> str:
    file = io.StringIO()
    console = Console(width=width, color_system=None, file=file)
    console.print(thing)
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_fits_the_terminal(width: int) -> None:
    for record in (make_record(), interrupted(make_record())):
        assert max(map(len, text_of(summary(view(record)), width).splitlines())) <= width


def test_tells_which_lora_a_member_is_compared_with() -> None:
    record = make_record()
    shown = view(record)
    assert "best LoRA that costs no more" in " ".join(text_of(summary(shown)).split())
    entry = next(e for e in shown.front if e.digest == shown.best)
    level = next(level for level in record.verdict.levels if level.digest == entry.digest)
    assert "against the tuned LoRA" in dict(facts(shown, entry))
    levels = (replace(level, against="0123456789abcdef"),)
    shown = view(replace(record, verdict=replace(record.verdict, levels=levels)))
    assert "against LoRA 01234567" in dict(facts(shown, entry))


def test_tells_the_pick_the_lora_and_the_verdict() -> None:
    record = make_record()
    shown = view(record)
    lines = text_of(summary(view(record)), 160).splitlines()
    assert record.verdict.text in " ".join(lines)
    picked = next(line for line in lines if shown.best[:8] in line)
    assert picked.split()[0].endswith("*")
    tuned = next(line for line in lines if record.baseline[:8] in line)
    assert tuned.split()[0].endswith("L")
    assert "is LoRA" in tuned
    for number, entry in enumerate(shown.front, start=1):
        line = next(line for line in lines if entry.digest[:8] in line)
        assert line.split()[0].rstrip("*L") == str(number)
        assert f"{entry.objectives['accuracy']:.3f} ±" in line
    reference = next(line for line in lines if record.reference[:8] in line)
    assert reference.split()[0] == "-"
    assert "(val)" in reference


def test_several_costs_fit_too() -> None:
    record = make_record()
    objectives = (*record.objectives, objective("train_flops"), objective("adapter_bytes"))
    lines = text_of(summary(view(replace(record, objectives=objectives)))).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("FLOPs" in line and "size" in line for line in lines)
    assert any(line.split()[:2] == ["6L", "lora"] for line in lines)
    reference = next(line for line in lines if record.reference[:8] in line)
    assert "3.01 KiB" in reference  # 770 parameters, priced though never confirmed


def _with_objectives(names: Sequence[str]) -> FrontView:
    """A front with further objectives, each of which has other values, with intervals."""
    shown = view(make_record())

    def more(entry: FrontEntry, at: int) -> FrontEntry:
        values = {name: 0.111 * (1 + k) + 0.001 * at for k, name in enumerate(names)}
        intervals = {name: (value - 0.02, value + 0.02) for name, value in values.items()}
        return replace(
            entry,
            objectives={**entry.objectives, **values},
            objectives_ci={**entry.objectives_ci, **intervals},
        )

    assert shown.baseline is not None
    assert shown.reference is not None
    return replace(
        shown,
        objectives=(*shown.objectives, *(Objective(name, "maximize") for name in names)),
        front=tuple(more(entry, at) for at, entry in enumerate(shown.front)),
        baseline=more(shown.baseline, 50),
        reference=more(shown.reference, 51),
    )


@pytest.mark.parametrize("n_objectives", range(1, 8))
@pytest.mark.parametrize("width", [60, 80, 100])
def test_every_objective_is_shown_in_full(n_objectives: int, width: int) -> None:
    shown = _with_objectives([f"task{k}.token_f1" for k in range(n_objectives)])
    text = text_of(summary(shown), width)
    assert "…" not in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    for column in front_columns(shown):
        if column.kind == "adapter":
            continue
        assert column.heading.strip("#") in text
        for entry in rows_of(shown):
            assert column.text(entry)[: 8 if column.kind == "digest" else None] in text
    # Each row has its mark in each table.
    n_tables = sum(line.split()[:1] == ["6L"] for line in lines)
    assert n_tables == sum(line.split()[:1] == ["5*"] for line in lines) >= 2


def test_four_objectives_stay_side_by_side_at_80_columns() -> None:
    record = make_record()
    costs = map(objective, ("train_flops", "adapter_bytes", "peak_memory_bytes"))
    shown = view(replace(record, objectives=(*record.objectives, *costs)))
    lines = text_of(summary(shown)).splitlines()
    row = next(line for line in lines if line.split()[:1] == ["5*"])
    assert row.split() == "5* 662d628d 23k 1.07T 90 KiB 286 MiB 0.802 ±0.037 0.0023".split()
    # What does not fit is beside the adapter.
    assert any(line.split()[:4] == ["5*", "ties", "+0.002", "ia3"] for line in lines)


def test_an_empty_run_prints() -> None:
    empty = replace(interrupted(make_record(8)), trials=(), front=(), baseline=None, reference=None)
    assert "Undecided" in text_of(summary(view(empty)))


def test_budget_shares() -> None:
    text = text_of(budget_table(make_record().budget))
    assert "63%" in text  # 372.1 of 587.3 seconds
    assert "6m 12s" in text


def test_markup_in_texts_is_not_obeyed() -> None:
    record = replace(make_record(20), warnings=("[bold]loud[/bold] [/oops]",))
    assert "[bold]loud[/bold] [/oops]" in text_of(summary(view(record)))
    assert "alert(1)" in text_of(summary(view(hostile())))
