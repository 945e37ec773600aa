from __future__ import annotations

import logging
import os
import warnings

import pytest
import transformers
from transformers.utils import logging as transformers_logging

from autopeft.utils.quiet import (
    ignored,
    quiet_datasets,
    quiet_loggers,
    quiet_peft,
    quiet_transformers,
)


def test_loggers_report_errors_only_and_get_their_levels_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loud = logging.getLogger("autopeft_test_loud")
    loud.setLevel(logging.INFO)
    with quiet_loggers("autopeft_test_loud", "autopeft_test_other"):
        loud.warning("noise")
        loud.error("an error")
    assert loud.level == logging.INFO
    assert logging.getLogger("autopeft_test_other").level == logging.NOTSET
    assert caplog.messages == ["an error"]


def test_transformers_is_quiet_inside_and_as_before_afterwards() -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with quiet_transformers():
        assert transformers.logging.get_verbosity() == logging.ERROR
        assert not transformers_logging.is_progress_bar_enabled()
        assert os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] == "1"
    after = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert after == before
    assert "TRANSFORMERS_NO_ADVISORY_WARNINGS" not in os.environ


def test_datasets_draws_no_bars_inside_and_as_before_afterwards() -> None:
    datasets = pytest.importorskip("datasets")
    before = datasets.are_progress_bars_disabled()
    with quiet_datasets():
        assert datasets.are_progress_bars_disabled()
    assert datasets.are_progress_bars_disabled() == before


def test_only_the_named_warnings_are_ignored() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet_peft():
            warnings.warn("Unsupported layer type 'x'", UserWarning, stacklevel=1)
            warnings.warn("another one", UserWarning, stacklevel=1)
        with ignored(FutureWarning):
            warnings.warn("old name", FutureWarning, stacklevel=1)
            warnings.warn("a third", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["another one", "a third"]


def test_user_code_may_clear_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: a whole search ended in a KeyError after it was confirmed (issue 18)."""
    monkeypatch.delenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", raising=False)
    with quiet_transformers():
        del os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"]
    assert "TRANSFORMERS_NO_ADVISORY_WARNINGS" not in os.environ
