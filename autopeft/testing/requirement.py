"""What all checks share: one line for what is wrong, and parts that are registered for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cloudpickle

from autopeft.utils.formatting import one_line
from autopeft.utils.registry import Registry


@dataclass(frozen=True)
class Requirement:
    """Requires things of a part, and names it where one does not hold."""

    part: str

    def that(self, is_so: bool, problem: str) -> None:
        """Raise an AssertionError that names the problem if something is not so."""
        if not is_so:
            raise AssertionError(f"{self.part}: {problem}")

    @contextmanager
    def no_error(self, doing: str) -> Iterator[None]:
        """Turn an error of the block into an AssertionError that says what was done."""
        try:
            yield
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{self.part}: {doing} fails: {one_line(error)}") from error

    def pickled(self, part: Any) -> Any:
        """Return the part after a way to a worker, by value."""
        with self.no_error("sending it to a worker (pickling it)"):
            return cloudpickle.loads(cloudpickle.dumps(part))


@contextmanager
def registered(registry: Registry[Any], name: str, part: Any) -> Iterator[None]:
    """Register a part for the block, unless it is known."""
    is_known = name in registry
    if not is_known:
        registry.register(name, part)
    try:
        yield
    finally:
        if not is_known:
            registry.forget(name)
