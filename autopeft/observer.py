"""Whoever shows a search's progress."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from autopeft.engine.dispatcher import Snapshot


class Observer(Protocol):
    """Whoever shows a search's progress."""

    def note(self, text: str) -> None:
        """A line worth reading."""

    def snapshot(self, snapshot: Snapshot) -> None:
        """The state after every change."""


class Silent:
    """Shows nothing."""

    def note(self, text: str) -> None:
        """Ignored."""

    def snapshot(self, snapshot: Snapshot) -> None:
        """Ignored."""
