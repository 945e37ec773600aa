"""Format numbers for people; every table, page and plot uses these functions."""

from __future__ import annotations

import math
import re

from autopeft.errors import printable


def human_count(value: float) -> str:
    """Return a count with three significant digits: 1234 -> "1.23k", 22_700_000 -> "22.7M"."""
    if not math.isfinite(value):
        return "-"
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def human_bytes(value: float) -> str:
    """Return bytes with a binary unit: 1536 -> "1.5 KiB"."""
    if not math.isfinite(value):
        return "-"
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(value) >= 1024**power:
            return f"{value / 1024**power:.3g} {unit}"
    return f"{value:.0f} B"


def human_seconds(seconds: float) -> str:
    """Return a duration: 75.2 -> "1m 15s", 7.6 -> "7.6s"."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def human_value(value: float, unit: str) -> str:
    """Return an objective's value, formatted by its unit; a number without unit has 3 decimals."""
    if unit == "bytes":
        return human_bytes(value)
    if unit == "seconds":
        return human_seconds(value)
    if unit in ("parameters", "FLOPs"):
        return human_count(value)
    if not math.isfinite(value):
        return "-"
    if unit:
        return f"{value:.3g} {unit}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 -> "1 trial", 2 -> "2 trials", 1200 -> "1,200 trials"."""
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def middle_cut(text: str, longest: int) -> str:
    """Return text whose middle is left out, and counted, if it is a quarter longer than `longest`.

    Example:
        >>> from autopeft.utils.formatting import middle_cut
        >>> middle_cut("a long way to go", 8)
        'a lo [8 characters] o go'
    """
    if len(text) <= 1.25 * longest:
        return text
    half = longest // 2
    return f"{text[:half]} [{len(text) - 2 * half} characters] {text[-half:]}"


def one_line(error: BaseException) -> str:
    """Return an error's type and text on one line.

    Example:
        >>> from autopeft.utils.formatting import one_line
        >>> one_line(ValueError("two" + chr(10) + "lines"))
        'ValueError: two lines'
    """
    try:
        text = str(error)
    except Exception:  # An error of the user's may fail at that, too.
        text = "its text cannot be read"
    return " ".join(f"{type(error).__name__}: {text}".split())


_MARKUP = re.compile(r"([\\`*{}\[\]<>#|~!&]|(?<![^\W_])_|_(?![^\W_]))")


def markdown_text(text: object) -> str:
    r"""Return text as Markdown shows it: one line, nothing in it read as markup or HTML.

    Example:
        >>> from autopeft.utils.formatting import markdown_text
        >>> print(markdown_text("a|b <b>"))
        a\|b \<b\>
    """
    return _MARKUP.sub(r"\\\1", printable(" ".join(str(text).split())))


def without_numbers(reason: str) -> str:
    """Return what two failures of one kind have in common: they may differ in numbers.

    Example:
        >>> from autopeft.utils.formatting import without_numbers
        >>> without_numbers("loss is NaN at step 12") == without_numbers("loss is NaN at step 7")
        True
    """
    return re.sub(r"\d+", "0", reason)
