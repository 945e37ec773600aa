"""The front as HTML and Markdown: every row, the pick, and nothing that breaks the page."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

from report_samples import make_record

from autopeft.confirm.verdict import Verdict
from autopeft.reporting.columns import rows_of
from autopeft.reporting.front_view import view
from autopeft.reporting.markup import front_html, front_markdown


class Rows(HTMLParser):
    """Counts the rows of a table and keeps its texts."""

    def __init__(self) -> None:
        super().__init__()
        self.n_rows = 0
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.n_rows += tag == "tr"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_html_has_a_row_for_each_candidate() -> None:
    shown = view(make_record())
    shown = replace(shown, verdict=Verdict(False, "No: a<b>c & d."))
    parser = Rows()
    parser.feed(front_html(shown))
    assert parser.n_rows == 1 + len(rows_of(shown))
    assert parser.texts[0] == "No: a<b>c & d."
    assert any("the pick" in text for text in parser.texts)


def test_markdown_has_a_row_for_each_candidate() -> None:
    shown = replace(view(make_record()), verdict=Verdict(False, "No: a|b * c."))
    lines = front_markdown(shown).split("\n")
    assert lines[0] == "**No: a\\|b \\* c.**"
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(rows_of(shown))
    widths = {line.replace("\\|", "").count("|") for line in table}
    assert len(widths) == 1


def test_markdown_of_others_holds_no_markup_of_theirs() -> None:
    hostile = "<img src=x onerror=y> [a](b) `c` \x1b[2J"
    shown = replace(view(make_record()), verdict=Verdict(False, hostile))
    first = front_markdown(shown).split("\n")[0]
    assert first == "**\\<img src=x onerror=y\\> \\[a\\](b) \\`c\\` ?\\[2J**"
