import io
from dataclasses import replace

import pytest
from report_samples import hostile, interrupted, make_record
from rich.console import Console

from autopeft.costs.objectives import objective
from autopeft.reporting.columns import facts
from autopeft.reporting.front_view import view
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
