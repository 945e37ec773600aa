"""The examples in the docstrings of public names run and print what they say."""

from __future__ import annotations

import doctest
import sys

import pytest

import autopeft


@pytest.mark.parametrize("name", sorted(set(autopeft.__all__) - {"__version__"}))
def test_examples(name: str) -> None:
    part = getattr(autopeft, name)
    module = sys.modules[part.__module__]
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder(recurse=False).find(part, name, globs=vars(module)):
        assert runner.run(test).failed == 0
