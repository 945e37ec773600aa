from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from autopeft import methods
from autopeft.cli import app
from autopeft.methods import table

_GUIDE = Path(__file__).parents[2] / "examples" / "guides" / "search_spaces.md"


def test_the_guide_has_the_table_that_the_command_prints() -> None:
    printed = CliRunner().invoke(app, ["methods", "--markdown"]).output.strip()
    text = _GUIDE.read_text(encoding="utf-8")
    between = text.split("<!-- methods: autopeft methods --markdown -->")[1]
    assert between.split("<!-- /methods -->")[0].strip() == printed


def test_every_method_has_a_row_and_every_row_its_cells() -> None:
    rows = table.rows()
    assert [row[0] for row in rows] == [method.name for method in methods.all_methods()]
    assert {len(row) for row in rows} == {len(table.HEADER)}


def test_roles_are_told_in_a_word() -> None:
    assert table.where(methods.get("lora")) == "linear, experts"
    assert table.where(methods.get("ln_tuning")) == "norm"
