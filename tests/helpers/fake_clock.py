"""A clock that stands still until a test moves it."""

from __future__ import annotations

from types import ModuleType

import pytest


class FakeClock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def replace_in(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> FakeClock:
        """Let these modules read this clock."""
        for module in modules:
            monkeypatch.setattr(module, "time", self)
        return self
