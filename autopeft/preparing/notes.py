"""What a preparation tells while it runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

Note = Callable[[str], None]


Phase = Callable[[str], AbstractContextManager[None]]
