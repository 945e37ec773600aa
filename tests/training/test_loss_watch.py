from __future__ import annotations

from autopeft.training.loss_watch import LossWatch


def test_only_losses_that_all_stay_far_above_the_start_are_a_divergence() -> None:
    assert LossWatch().add([0.7, 0.6, *[1.5] * 10]) == (0.7, 1.5)
    assert LossWatch().add([0.7, 0.6, *[1.5] * 9, 1.3]) is None
    assert LossWatch().add([0.7, 0.6, *[0.69] * 50]) is None  # collapsed to a guess
    hard_batches = [0.01, 0.02, *([0.0] * 5 + [3.0]) * 20]
    assert LossWatch().add(hard_batches) is None
    assert LossWatch().add([-1.0, -1.0, *[0.0] * 20]) is None


def test_losses_may_come_one_by_one() -> None:
    watch = LossWatch()
    seen = [watch.add([loss]) for loss in (0.7, 0.6, 0.5, *[9.0] * 10)]
    assert seen == [None] * 12 + [(0.7, 9.0)]
