from __future__ import annotations

import pytest

from autopeft.api import merge_settings
from autopeft.errors import SettingsError
from autopeft.tasks.registry import TASKS


@pytest.mark.parametrize("name", TASKS.registered)
def test_a_task_has_the_name_that_it_is_listed_by(name: str) -> None:
    assert TASKS[name].name == name


def test_an_unknown_task_is_reported_before_anything_is_read() -> None:
    with pytest.raises(SettingsError, match="task='astrology': no such task; use "):
        merge_settings({"task": "astrology", "data": "nowhere.csv"}, {})
