"""A metric: how often a prediction is off by one at most."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

import autopeft


def _is_close(targets: NDArray[Any], predictions: NDArray[Any]) -> NDArray[Any]:
    """Return one value for each row; their mean is the metric."""
    return np.asarray(np.abs(targets - predictions) <= 1.0, dtype=float)


within_one = autopeft.Metric("within_one", "maximize", _is_close, "values", bounds=(0.0, 1.0))
