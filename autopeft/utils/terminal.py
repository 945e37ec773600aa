"""Where text meets the terminal: control characters in it are shown, and not obeyed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TextIO

from autopeft.errors import printable

if TYPE_CHECKING:
    from rich.console import Console


def echo(text: str, *, err: bool = False) -> None:
    """Print text to standard output, or to standard error."""
    import click

    click.echo(printable(text), err=err)


def console(file: TextIO | None = None, **options: Any) -> Console:
    """Return a console of rich that prints text of any origin.

    Args:
        file: Where it prints; None: standard output.
        **options: Further options of rich's console.
    """
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class PrintableConsole(Console):
        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterable[Segment]:
            """Yield segments whose text is printable; the console's own control codes stay."""
            for segment in super().render(renderable, options):
                if segment.control:
                    yield segment
                else:
                    yield Segment(printable(segment.text), segment.style)

    return PrintableConsole(file=sys.stdout if file is None else file, **options)
