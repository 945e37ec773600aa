from __future__ import annotations

import numpy as np

from autopeft.training.loss_watch import LossWatch


def _ends(losses: list[float], again: float) -> bool:
    """Return whether a training with these losses ends, given that of its first batch later on."""
    watch = LossWatch()
    for loss in losses:
        if watch.add([again if watch.wants_first else loss]) is not None:
            return True
    return False


def test_only_losses_that_all_stay_far_above_the_start_are_a_divergence() -> None:
    assert _ends([0.7, 0.6, *[1.5] * 11], 1.4)
    assert not _ends([0.7, 0.6, *[1.5] * 9, 1.3, 1.3], 1.4)
    assert not _ends([0.7, 0.6, *[0.69] * 50], 1.4)  # collapsed to a guess
    assert not _ends([0.01, 0.02, *([0.0] * 5 + [3.0]) * 20], 1.4)  # hard batches
    assert not _ends([-1.0, -1.0, *[0.0] * 20], 1.4)


def test_a_training_that_explodes_in_its_first_update_ends() -> None:
    assert _ends([0.7, *[90.0] * 12], 80.0)
    assert not _ends([0.7, *[1.3] * 12, *[0.6] * 40], 1.2)
    assert not _ends([0.1, *[0.7] * 40], 0.15)  # an easy first batch


def test_easy_first_batches_end_no_training() -> None:
    assert not _ends([0.01, 0.02, *[0.5] * 40], 0.02)
    # A model that is right on most rows: the loss of a batch is that of its few wrong rows.
    rng = np.random.default_rng(0)
    losses = np.where(rng.random((500, 200, 16)) < 0.06, 4.0, 0.01).mean(axis=2)
    n_suspected = sum(_ends(row, 9.0) for row in losses.tolist())
    assert n_suspected > 10
    assert not any(_ends(row, row[0] * 1.3) for row in losses.tolist())


def test_losses_may_come_one_by_one_or_many_at_once() -> None:
    losses = [0.7, 0.6, 0.5, *[9.0] * 10]
    one_by_one, at_once = LossWatch(), LossWatch()
    assert [one_by_one.add([loss]) for loss in losses] == [None] * 13
    assert at_once.add(losses) is None
    assert at_once.wants_first
    assert one_by_one.add([8.0]) == at_once.add([8.0, 9.0, 9.0]) == (0.7, 9.0)


def test_after_easy_first_batches_a_divergence_is_one_from_what_followed() -> None:
    watch = LossWatch()
    watch.add([0.01, 0.02, *[0.5] * 10])
    watch.add([0.02, *[0.9] * 10])
    assert not watch.wants_first
    watch.add([1.5] * 10)
    assert watch.wants_first
    assert watch.add([1.4]) == (0.5, 1.5)
