"""Importing without looking for garbage."""

from __future__ import annotations

import gc
import importlib

import pytest

from autopeft.utils.gc import frozen_gc, paused_gc


def test_the_collector_rests_inside_and_works_again_after() -> None:
    with paused_gc():
        with paused_gc():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_failed_import_leaves_it_working() -> None:
    with pytest.raises(ModuleNotFoundError), paused_gc():
        importlib.import_module("autopeft.nothing_of_this_name")
    assert gc.isenabled()


def test_who_switched_it_off_finds_it_off() -> None:
    gc.disable()
    try:
        with paused_gc():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_is_there_rests_and_is_looked_at_again_after() -> None:
    gc.unfreeze()  # Libraries that other tests imported may have frozen theirs.
    with frozen_gc():
        # No equal counts: frozen objects of other tests may be freed meanwhile.
        with frozen_gc():
            assert gc.get_freeze_count() > 0
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_what_the_caller_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        with frozen_gc():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
