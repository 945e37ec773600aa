from dataclasses import replace
from html.parser import HTMLParser

import pytest
from report_samples import hostile, interrupted, make_record

from autopeft.reporting.columns import front_columns, rows_of
from autopeft.reporting.front_view import view
from autopeft.reporting.html import page
from autopeft.reporting.plots import Plot
from autopeft.reporting.record import SearchRecord

PNG = b"\x89PNG not really"


class Reader(HTMLParser):
    """Collects elements and text, and checks that elements nest."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def read(record: SearchRecord) -> Reader:
    reader = Reader()
    svg = '<svg id="front-figure"></svg>'
    plots = [Plot("front", "the front", PNG, svg), Plot("curves", "the curves", PNG)]
    reader.feed(page(view(record), record.trials, plots))
    reader.close()
    assert not reader.open
    return reader


def test_what_was_not_searched_is_said() -> None:
    shares = {"mlp.experts.gate_up_proj": 0.5, "mlp.gate": 0.004}
    text = " ".join(read(replace(make_record(), unsearched=shares)).text)
    assert "50% of the blocks' parameters get no adapter: mlp.experts.gate_up_proj (50%)" in text
    assert "not searched" not in " ".join(read(make_record()).text)


@pytest.mark.parametrize("record", [make_record(), interrupted(make_record()), hostile()])
def test_nothing_is_fetched_and_nothing_breaks_out(record: SearchRecord) -> None:
    reader = read(record)
    assert len(reader.all("script")) == 1
    assert len(reader.all("img")) == 1
    for name, attributes in reader.elements:
        assert not any(key.startswith("on") for key in attributes)
        for key in ("src", "href"):
            assert (attributes.get(key) or "data:").startswith("data:")
        assert name not in ("link", "iframe", "object", "base", "form")
    policies = [a["content"] or "" for a in reader.all("meta") if "http-equiv" in a]
    assert "default-src 'none'" in policies[0]


def test_hostile_text_is_shown_as_text() -> None:
    text = "".join(read(hostile()).text)
    assert text.count("<script>alert(1)</script>") >= 5


def test_every_member_can_be_used() -> None:
    record = make_record()
    reader = read(record)
    text = "".join(reader.text)
    assert record.verdict is not None
    assert record.verdict.text in text
    ids = {attributes.get("id") for _, attributes in reader.elements}
    for entry in view(record).front:
        assert f"member-{entry.digest}" in ids
        assert f'autopeft.load_adapter("models/minilm", "adapters/{entry.digest}")' in text


def test_the_script_finds_a_tooltip_for_every_entry_that_is_drawn() -> None:
    record = make_record()
    shown = view(record)
    tips = {
        a["data-digest"]: a["data-tip"] or "" for a in read(record).all("tr") if "data-tip" in a
    }
    for entry in (*shown.front, *shown.dominated_finalists):
        lines = tips[entry.digest].split("\n")
        assert lines[0] == entry.summary
        assert lines[1].startswith("accuracy: 0.")
        assert lines[-1] == entry.digest


def test_an_interrupted_search_is_marked() -> None:
    text = "".join(read(interrupted(make_record())).text)
    assert "was interrupted" in text
    assert "No candidate was confirmed" in text


def test_an_empty_search_is_a_page_without_members() -> None:
    empty = replace(interrupted(make_record(8)), trials=(), front=(), baseline=None, reference=None)
    assert not [a for a in read(empty).all("details") if a.get("id")]


def test_rows_have_the_values_they_are_sorted_by() -> None:
    record = make_record()
    shown = view(record)
    names = [column.heading for column in front_columns(shown)]
    reader = read(record)
    cells = [
        a for a in reader.all("td") if a.get("class") in ("number", "text", "digest", "adapter")
    ]
    first = cells[: len(names)]
    assert [a["class"] for a in first] == [column.kind for column in front_columns(shown)]
    sorted_by = {name: a.get("data-value") for name, a in zip(names, first, strict=True)}
    cheapest = rows_of(shown)[0]
    assert sorted_by["params"] == str(cheapest.objectives["trainable_params"])
    assert sorted_by["digest"] is None  # sorted as text: a digest may look like a number


def test_what_was_dropped_cut_and_noticed_is_on_the_page() -> None:
    record = make_record()
    text = "".join(read(record).text)
    assert "; ".join(record.data.lines()) in text
    assert "text-classification (text=review, label=stars)" in text
