"""Where text meets the terminal: control characters in it are shown, and not obeyed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from autopeft.errors import printable

if TYPE_CHECKING:
    from rich.console import Console


def echo(text: str, *, err: bool = False) -> None:
    """Print text to standard output, or to standard error."""
    import click

    with written(err=err):
        click.echo(printable(text), err=err)


def open_streams() -> None:
    """Open what was closed for this process (`>&-`) on nothing.

    The next file that is opened would be in its place, and hold what libraries print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


@contextmanager
def written(*, err: bool = False) -> Iterator[None]:
    """Print in a block; say once on standard error if the output takes no more, as on a full disk.

    A reader that goes away (`| head`) is click's to deal with.
    """
    stream = sys.stderr if err else sys.stdout
    try:
        yield
        if stream is not None:
            stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        with suppress(OSError, ValueError):
            # What is left in the buffer would fail once more when Python ends.
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)
        if not err:
            echo(
                f"autopeft: standard output cannot be written ({error.strerror}); make room there, "
                "`autopeft report` shows a search's result again",
                err=True,
            )


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
