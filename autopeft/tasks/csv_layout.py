"""Finds out how a CSV file is written: separator, quotes, header; and checks every line of it."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from autopeft.utils.formatting import counted
from autopeft.utils.text_files import long_fields

SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
"""Separators that are recognized -> their names."""

_SAMPLE = 200_000
"""Characters that decide the separator."""


class FileError(ValueError):
    """What is wrong with a file, and the remedy."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy


@dataclass(frozen=True)
class CsvLayout:
    """How a CSV file is written.

    Attributes:
        separator: What stands between two fields.
        has_quotes: Whether quotes enclose fields; else they are characters like any other.
        escape: What a quote inside a quoted field has before it; None: quotes are doubled.
        skips_spaces: Whether spaces after a separator belong to it.
        names: Names of the columns.
        n_rows: Number of rows, without header and empty lines.
        n_broken: Number of rows over several lines, where each line might be a row as well.
    """

    separator: str
    has_quotes: bool = True
    escape: str | None = None
    skips_spaces: bool = False
    names: tuple[str, ...] = ()
    n_rows: int = 0
    n_broken: int = 0

    def notes(self, expected: str) -> Iterator[str]:
        """Yield what is unusual about the file, one sentence each."""
        if self.separator != expected and len(self.names) > 1:
            yield f"the separator is a {SEPARATORS[self.separator]}"
        if not self.has_quotes:
            yield "quotes are read as part of the text, since they enclose no fields"
        if self.escape is not None:
            yield "quotes inside a field are escaped with a backslash"
        if self.n_broken:
            yield f"quotes join several lines into one row {self.n_broken} times"


def csv_layout(text: str, expected: str) -> CsvLayout:
    """Return the layout in which every line has as many fields as the header.

    Args:
        text: The whole file.
        expected: The separator to prefer where two fit.

    Raises:
        FileError: if there is no such layout; it names the first line that does not fit.
    """
    if text.lower().startswith("sep="):
        raise FileError("begins with a line for spreadsheets (sep=)", "remove the first line")
    with long_fields():
        fitting, failures = [], []
        for layout in _layouts(text, expected):
            checked = _Check(text, layout)
            if checked.problem is not None:
                failures.append(checked)
                continue
            fitting.append(checked)
            if not checked.n_broken:
                break
        if not fitting:
            # The layout that fits the most lines is the one that was meant.
            raise max(failures, key=lambda each: each.line).error()
        chosen = fitting[0]
        plain = next((each for each in fitting if not each.layout.has_quotes), None)
        is_unclear = plain is not None and chosen.n_rows != plain.n_rows and chosen.n_fields > 1
        if plain is not None and is_unclear and chosen.layout.separator == "\t":
            # Programs that write tabs seldom quote; quotes of the text pair up over two lines.
            chosen, is_unclear = plain, False
        names = _names(chosen)
        n_broken = chosen.n_broken if is_unclear else 0
        return replace(chosen.layout, names=names, n_rows=chosen.n_rows, n_broken=n_broken)


def _layouts(text: str, expected: str) -> list[CsvLayout]:
    """Return the layouts of the most likely separator, the usual one first."""
    sample = text[:_SAMPLE]
    if len(text) > _SAMPLE and "\n" in sample:
        sample = sample[: sample.rindex("\n") + 1]
    separators = sorted(SEPARATORS, key=lambda separator: separator != expected)
    scored = [
        (check.share, check.n_fields, layout.separator)
        for separator in separators
        for layout in _styles(sample, separator)
        if (check := _Check(sample, layout, whole=False)).n_fields > 1
    ]
    if scored:
        best = max(share for share, _, _ in scored)
        separator = next(sep for share, _, sep in scored if share == best)
        return _styles(text, separator)
    # One column. A separator that no row has leaves each line whole, unless every row has another.
    for separator in separators:
        widths = {len(row) for _, row in _rows(sample, CsvLayout(separator), strict=False)}
        if len(widths) == 2 and 1 in widths:
            rows = [len(row) for _, row in _rows(sample, CsvLayout(separator), strict=False)]
            if rows[0] == 1 and rows.count(1) == 1 and len(rows) > 2:
                return _styles(text, separator)
    return [layout for separator in separators for layout in _styles(text, separator)]


def _styles(text: str, separator: str) -> list[CsvLayout]:
    first = text[: text.find("\n")] if "\n" in text else text
    usual = CsvLayout(separator, skips_spaces=f'{separator} "' in first)
    if '"' not in text:
        return [usual]
    styles = [usual, replace(usual, has_quotes=False, skips_spaces=False)]
    return [*styles, replace(usual, escape="\\")] if '\\"' in text else styles


def _rows(
    text: str, layout: CsvLayout, *, strict: bool = True
) -> Iterator[tuple[tuple[int, int], list[str]]]:
    """Yield the first and last line of each record, and its fields; empty lines are left out."""
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=layout.separator,
        quoting=csv.QUOTE_MINIMAL if layout.has_quotes else csv.QUOTE_NONE,
        doublequote=layout.escape is None,
        escapechar=layout.escape,
        skipinitialspace=layout.skips_spaces,
        strict=strict,
    )
    end = 0
    try:
        for row in reader:
            start, end = end + 1, reader.line_num
            is_blank = not row or (len(row) == 1 and row[0] != "" and not row[0].strip())
            if not is_blank:
                yield (start, end), row
    except csv.Error as error:
        raise csv.Error(end + 1, str(error)) from error


class _Check:
    """Reads a text in a layout, up to the first line that does not fit.

    Attributes:
        n_fields: Number of fields of the header.
        n_rows: Number of rows without the header.
        n_broken: Number of rows over several lines.
        share: Share of the records that have as many fields as the header.
        problem: The first line that does not fit, in words; None: all do.
    """

    def __init__(self, text: str, layout: CsvLayout, *, whole: bool = True) -> None:
        self.layout = layout
        self.header: list[str] = []
        self.first_rows: list[list[str]] = []
        self.n_rows = self.n_broken = 0
        self.line = 0
        self.problem: str | None = None
        n_good = n_all = 0
        try:
            for (start, end), row in _rows(text, layout):
                if not self.header:
                    self.header = row
                    continue
                n_all += 1
                self.line = start
                if len(row) == len(self.header):
                    n_good += 1
                elif whole:
                    fields = counted(len(row), "field")
                    self.problem = (
                        f"line {start} has {fields} where the header has {len(self.header)}"
                    )
                    break
                self.n_rows += 1
                self.n_broken += end > start
                if len(self.first_rows) < 1000:
                    self.first_rows.append(row)
        except csv.Error as error:
            n_all += 1
            self.line, reason = error.args
            open_quote = "unexpected end of data" in reason
            what = "opens a quote that is never closed" if open_quote else "has text after a quote"
            self.problem = f"line {self.line} {what}"
        self.n_fields = len(self.header)
        # A file of nothing but a header fits.
        self.share = n_good / n_all if n_all else 1.0

    def error(self) -> FileError:
        name = SEPARATORS[self.layout.separator]
        return FileError(
            f"{self.problem} (fields are separated by a {name})",
            "let the first line name the columns, put double quotes around fields that hold a "
            f"{name}, write quotes inside them twice, and give each row as many fields",
        )


def _names(check: _Check) -> tuple[str, ...]:
    """Return the names in the header; raise a FileError if there seems to be none."""
    header = [name.strip() for name in check.header]
    for place, name in enumerate(header):
        cells = [row[place].strip() for row in check.first_rows]
        again = cells.count(name) if name else 0
        is_odd_number = _is_number(name) and not all(map(_is_number, header))
        if again > 1 and len(cells) > 2:
            why = f"{name!r} also stands in {again} rows below"
        elif len(name) > 100:
            why = f"{name[:40]!r}... is long for a name"
        elif is_odd_number and cells and all(map(_is_number, cells)):
            why = f"{name!r} is a number, as in the rows below"
        else:
            continue
        raise FileError(
            f"the first line must name the columns, but looks like data ({why})",
            "add a first line with names, such as text,label, and leave out repeated headers",
        )
    names = [name or f"column_{place}" for place, name in enumerate(header, start=1)]
    check_names(names)
    return tuple(names)


MAX_COLUMNS = 10_000
"""Most columns of a table: its cells take their number times that of the rows."""


def check_names(names: list[str]) -> None:
    """Raise a FileError if two columns have the same name, or there are too many."""
    if len(names) > MAX_COLUMNS:
        raise FileError(
            f"has {len(names):,} columns; at most {MAX_COLUMNS:,} are read",
            "check its separator and quotes",
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise FileError(f"two columns are named {twice[0]!r}", "give each column a name of its own")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
