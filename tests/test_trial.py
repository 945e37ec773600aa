"""Trials and their oriented values."""

from __future__ import annotations

import numpy as np

from autopeft.costs.objectives import objective
from autopeft.trial import oriented


def test_minimized_values_are_turned_round_and_missing_ones_are_nan() -> None:
    objectives = (objective("accuracy"), objective("trainable_params"))
    points = oriented([{"accuracy": 1.0, "trainable_params": 2.0}, {"accuracy": 0.5}], objectives)
    np.testing.assert_array_equal(points, [[1.0, -2.0], [0.5, np.nan]])
    assert oriented([], objectives).shape == (0, 2)
