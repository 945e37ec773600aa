"""A hub that cannot be reached is asked once, and nothing waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import huggingface_hub
import pytest

from autopeft.errors import DataError
from autopeft.models.checkpoint import is_local_only
from autopeft.tasks.reading import read
from autopeft.utils.online import is_hub_reachable, offline_if_unreachable


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, float]]]:
    """A machine without the hub; what it was asked, and how long an answer may take."""
    questions: list[tuple[str, float]] = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            questions.append((url, timeout))
            raise ConnectionError

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} would be tried again and again")

    for place in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    is_hub_reachable.cache_clear()
    yield questions
    is_hub_reachable.cache_clear()


def test_models_and_data_ask_once(asked: list[tuple[str, float]]) -> None:
    assert is_local_only("a/b")
    assert is_local_only("c/d")
    with pytest.raises(DataError, match=r"neither a file here nor .* the network") as caught:
        read("data", "nobody/no-such-data")
    assert "\n" not in str(caught.value)
    assert [seconds for _, seconds in asked] == [4.0]


def test_what_is_offline_meanwhile_is_as_before(asked: list[tuple[str, float]]) -> None:
    with offline_if_unreachable():
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE
