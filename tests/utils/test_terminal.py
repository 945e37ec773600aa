"""No text of any origin reaches the terminal as a control sequence."""

from __future__ import annotations

import io
import warnings

import pytest
from rich.table import Table
from rich.text import Text

from autopeft.callbacks import PlainProgress
from autopeft.utils.terminal import console, echo

HOSTILE = "label\x1b]0;owned\x07\x1b[2J\u202e\ud800"


def test_a_printed_line_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    echo(HOSTILE)
    echo(HOSTILE, err=True)
    for text in capsys.readouterr():
        assert text == "label?]0;owned??[2J??\n"


def test_a_table_has_none_but_its_own() -> None:
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(Text(HOSTILE, style="bold"))
    file = io.StringIO()
    display = console(file, force_terminal=True, width=60)
    display.print(table)
    shown = file.getvalue()
    assert "\x1b[1m" in shown, "the style of the table itself"
    assert "\x1b]" not in shown
    assert "\x1b[2J" not in shown


def test_a_line_of_progress_has_none() -> None:
    file = io.StringIO()
    PlainProgress(file).on_message(HOSTILE)
    assert file.getvalue() == "label?]0;owned??[2J??\n"


def test_a_warning_of_the_command_line_has_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from autopeft import cli

    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr("sys.argv", ["autopeft", "spaces"])
    with pytest.raises(SystemExit):
        cli.main()
    capsys.readouterr()
    assert warnings.formatwarning(HOSTILE, UserWarning, "", 1) == (
        "autopeft: warning: label?]0;owned??[2J??\n"
    )
