"""HTML and SVG elements as values: text is escaped unless it is already `Html`."""

from __future__ import annotations

import html
from collections.abc import Iterable

_VOID = frozenset({"meta", "img", "br", "hr"})


class Html(str):
    """Text that is markup, and so is not escaped again."""

    __slots__ = ()


def join(parts: Iterable[str], between: str = "") -> Html:
    """Parts one after another; those that are plain text are escaped."""
    return Html(between.join(p if isinstance(p, Html) else html.escape(p) for p in parts))


def el(name: str, /, *children: str, **attributes: object) -> Html:
    """One element.

    Args:
        name: Tag name.
        *children: `Html` as it is, plain text escaped.
        **attributes: Values are escaped; a trailing underscore is dropped from a name, other
            underscores become hyphens, None leaves the attribute out.
    """
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    start = f"<{name}{words}>"
    return Html(start if name in _VOID else f"{start}{join(children)}</{name}>")
