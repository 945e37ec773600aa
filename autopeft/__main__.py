"""The command's entry: a signal that comes while the rest is imported ends it with one line."""

from __future__ import annotations

import os
import signal
from typing import Any

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


def main() -> None:
    """Import the command line and run it."""
    # Nothing has begun, so nothing is to be saved; an exception would pass through the imports of
    # libraries, some of which make another one of it.
    before = {}
    for each in (getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)):
        handler = signal.getsignal(each)
        if handler is not signal.SIG_IGN:  # As `nohup` does.
            before[each] = handler
            signal.signal(each, _end)
    from autopeft.cli import main as run

    for each, handler in before.items():
        signal.signal(each, signal.SIG_DFL if handler is None else handler)
    run()


def _end(number: int, frame: Any) -> None:
    """Say that the command was interrupted, and end as it does later."""
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(130)


if __name__ == "__main__":
    main()
