import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_samples import hostile, interrupted, make_record

from autopeft.reporting.front_view import view
from autopeft.reporting.html import page
from autopeft.reporting.markup import Html, el
from autopeft.reporting.trials_csv import trial_lines

PNG = b"\x89PNG not really"


class Reader(HTMLParser):
    """Collects elements and text, and checks that elements nest."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(record) -> Reader:
    reader = Reader()
    reader.feed(page(view(record), trial_lines(record), {"curves.png": PNG}))
    reader.close()
    assert not reader.open
    return reader


@pytest.mark.parametrize("record", [make_record(), interrupted(make_record()), hostile()])
def test_nothing_is_fetched_and_nothing_breaks_out(record):
    reader = read(record)
    names = [name for name, _ in reader.elements]
    assert names.count("script") == 1
    assert names.count("img") == 1
    for name, attributes in reader.elements:
        assert not any(key.startswith("on") for key in attributes)
        for key in ("src", "href"):
            assert attributes.get(key, "data:").startswith("data:")
        assert name not in ("link", "iframe", "object", "base", "form")
    assert "default-src 'none'" in next(
        a["content"] for _, a in reader.elements if "http-equiv" in a
    )


def test_hostile_text_is_shown_as_text():
    text = "".join(read(hostile()).text)
    assert text.count("<script>alert(1)</script>") >= 5


def test_every_member_can_be_used():
    record = make_record()
    reader = read(record)
    text = "".join(reader.text)
    assert record.verdict.text in text
    ids = {attributes.get("id") for _, attributes in reader.elements}
    for entry in view(record).front:
        assert f"member-{entry.digest}" in ids
        assert f'autopeft.load_adapter("models/minilm", "adapters/{entry.digest}")' in text
    dots = [a for _, a in reader.elements if a.get("class", "").startswith("dot")]
    assert len(dots) == len(view(record).front) + len(view(record).dominated_finalists)


def test_interrupted_run_is_told():
    text = "".join(read(interrupted(make_record())).text)
    assert "was interrupted" in text
    assert "Nothing was confirmed" in text


def test_an_empty_run_is_a_page_without_a_chart():
    empty = replace(
        interrupted(make_record(8)), trials=(), front=(), best=None, baseline=None, reference=None
    )
    assert "svg" not in [name for name, _ in read(empty).elements]


def test_rows_can_be_sorted_by_number():
    html = page(view(make_record()), trial_lines(make_record()), {})
    assert re.search(r'class="number" data-value="\d+"', html)


@given(st.text(), st.text())
def test_elements_escape_what_is_not_markup(text: str, attribute: str):
    reader = Reader()
    reader.feed(el("p", text, el("b", "x"), title=attribute))
    reader.close()
    assert [name for name, _ in reader.elements] == ["p", "b"]


def test_markup_is_not_escaped_twice():
    assert el("p", Html("<b>&amp;</b>"), "<&") == "<p><b>&amp;</b>&lt;&amp;</p>"
    assert el("img", alt='a"b', src=None) == '<img alt="a&quot;b">'
