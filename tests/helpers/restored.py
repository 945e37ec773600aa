"""Registries as they were before a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from autopeft.utils.registry import Registry


@contextmanager
def restored(*registries: Registry[Any]) -> Iterator[None]:
    """Forget what is registered in this context."""
    before = [dict(registry._items) for registry in registries]
    yield
    for registry, items in zip(registries, before, strict=True):
        registry._items.clear()
        registry._items.update(items)
