"""Importing without looking for garbage."""

from __future__ import annotations

import gc

import pytest

from autopeft.imports import quick_imports


def test_the_collector_rests_inside_and_works_again_after() -> None:
    with quick_imports():
        with quick_imports():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_failed_import_leaves_it_working() -> None:
    with pytest.raises(ModuleNotFoundError), quick_imports():
        import autopeft.nothing_of_this_name  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()


def test_who_switched_it_off_finds_it_off() -> None:
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
