"""Tables about tasks and data: legible at 80 columns, and nothing that is learned is hidden."""

from __future__ import annotations

from rich.console import Console, RenderableType

from autopeft.reporting.data_tables import preview_text, tasks_table
from autopeft.tasks.preview import Piece, Preview, PreviewRow, Sequence
from autopeft.tasks.registry import TASKS
from autopeft.tasks.summary import DataSummary

DATA = DataSummary({"train": 9}, task="sft", columns={"text": "body"}, notes=("b.csv: BOM",))


def shown(renderable: RenderableType) -> str:
    console = Console(width=80, no_color=True)
    with console.capture() as capture:
        console.print(renderable)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    return "\n".join(line.rstrip() for line in lines)


def of_rows(*rows: PreviewRow) -> str:
    return shown(preview_text(Preview(DATA, (4, 5, 6, 7), rows)))


def joined(text: str) -> str:
    return "".join(text.split())


def test_every_task_has_its_columns_metrics_and_options() -> None:
    text = shown(tasks_table())
    for task in TASKS.parts():
        assert task.name in text
        for word in (*(c.role for c in task.columns), *task.metrics, *task.options, task.space):
            assert word in text, (task.name, word)


def test_what_is_given_loses_its_middle_and_what_is_learned_is_whole() -> None:
    given, learned = "g" * 5000, "l" * 5000
    pieces = (Piece(given, False, 90), Piece(learned, True, 80))
    text = of_rows(PreviewRow(3, "b.csv", (Sequence("", pieces),)))
    assert "row 4 of b.csv" in text
    assert "170 tokens" in text
    assert f"»{learned}«" in joined(text)
    assert "[4760characters]" in joined(text)


def test_the_answers_of_a_pair_are_named() -> None:
    pair = [Sequence(n, (Piece(n * 2, True, 1),)) for n in ("chosen", "rejected")]
    text = of_rows(PreviewRow(0, "b.csv", tuple(pair)))
    assert "  chosen    1 token: »chosenchosen«" in text
    assert "  rejected  1 token: »rejectedrejected«" in text


def test_a_tag_stands_with_its_word() -> None:
    pieces = (Piece("Rome", True, 1, "B-LOC"), Piece("##a", False, 1), Piece("is", True, 1, "O"))
    text = of_rows(PreviewRow(0, "b.csv", (Sequence("", pieces),)))
    assert "»Rome/B-LOC«##a»is/O«" in text


def test_an_image_is_shown_as_its_size_with_its_label() -> None:
    text = of_rows(PreviewRow(0, "b", (), (("pixel_values", "3 x 8 x 8"),), "cat"))
    assert "pixel_values  3 x 8 x 8" in text
    assert "»cat«" in text


def test_what_was_noticed_comes_first() -> None:
    text = of_rows()
    assert text.startswith("task sft (text=body)\n- 9 train rows\n- b.csv: BOM\n")
