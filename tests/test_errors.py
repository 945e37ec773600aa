"""Errors travel between processes."""

from __future__ import annotations

import pickle

from autopeft.errors import DataError, UserError


def test_an_error_of_a_worker_arrives_whole() -> None:
    error = DataError("data", "rows.csv", "has no rows", "use one with data")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, DataError)
    assert issubclass(DataError, UserError)
    assert (str(again), again.field, again.remedy) == (str(error), "data", "use one with data")
