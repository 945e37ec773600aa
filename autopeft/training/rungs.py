"""The steps at which a training reports. Free of torch: a search is planned without it."""

from __future__ import annotations

from autopeft.errors import SettingsError

EARLIEST_STEP = 25
"""No step before this one is a rung. At step 10 of 90, close to the warm-up, the losses of good and
bad candidates differ by less than their noise, and a pruner would stop the wrong ones."""


def rung_steps(steps: int, eta: int, n: int, *, earliest: int = 1) -> tuple[int, ...]:
    """Return the steps at which a training of `steps` steps reports.

    Args:
        steps: Optimizer steps of the full training.
        eta: Ratio between neighboring rungs.
        n: Number of rungs, the end included; fewer are returned if some fall together.
        earliest: Rungs before this step are left out, but never the end.

    Returns:
        Increasing steps, the last one `steps`. E.g. (11, 33, 100) for 100 steps, eta 3, n 3.

    Raises:
        SettingsError: if steps or n is below 1, or eta below 2.
    """
    for name, value, least in (("steps", steps, 1), ("eta", eta, 2), ("rungs", n, 1)):
        if value < least:
            raise SettingsError(name, value, f"`{name} >= {least}` must hold", f"use e.g. {least}")
    ends = {max(1, round(steps / eta**power)) for power in range(n)}
    return tuple(sorted(end for end in ends if end >= earliest or end == steps))
