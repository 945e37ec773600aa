"""Whether the hub can be reached; its own clients would retry for half a minute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

_PROBE_SECONDS = 4.0


@lru_cache(maxsize=1)
def is_hub_reachable() -> bool:
    """Ask the hub once a process, briefly."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(
            huggingface_hub.constants.ENDPOINT, timeout=_PROBE_SECONDS
        )
    except Exception:  # Any error of the HTTP library means that the hub cannot be reached.
        return False
    return True


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Let datasets read its cache at once where the hub cannot be reached."""
    import datasets
    import huggingface_hub

    if is_hub_reachable():
        yield
        return
    places: tuple[Any, ...] = (huggingface_hub.constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
