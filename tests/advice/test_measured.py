"""The file that the package ships, and what follows from such a file."""

from __future__ import annotations

import math
from importlib import resources

import numpy as np
import pytest
import sensitivity

from autopeft.advice.measured import (
    Measured,
    MeasuredSite,
    Setting,
    best_score,
    read_measured,
    worths,
)
from autopeft.advice.scores import SCORES


def test_the_file_has_a_figure_for_every_score_that_is_shown() -> None:
    measured = read_measured()
    assert set(measured.settings) == set(sensitivity.SETTINGS)
    for setting in measured.settings.values():
        assert len(setting.sites) >= 16
        assert len(setting.references) >= 2
        for site in setting.sites:
            assert set(site.scores) == set(SCORES)
            assert len(site.losses) == len(setting.references)
            assert all(map(math.isfinite, (*site.losses, *site.scores.values())))
    for worth in worths(measured).values():
        for figure in (*worth.settings.values(), worth.mean):
            assert -1 <= figure.low <= figure.high <= 1


def test_the_file_is_what_the_benchmark_writes() -> None:
    text = resources.files("autopeft.advice").joinpath("measured.json").read_text(encoding="utf-8")
    assert sensitivity._compact(read_measured()) == text
    assert read_measured().command.split()[1] == "examples/benchmarks/sensitivity.py"


def _measured(told: str, sign: int = 1, noise: float = 0.1) -> Measured:
    """Four settings of 24 sites where one score tells the gains, but for noise."""
    rng = np.random.default_rng(0)
    settings = {}
    for name in "abcd":
        sites = []
        for number in range(24):
            scores = {key: float(rng.normal()) for key in ("depth", "one", "two")}
            gain = sign * scores[told] + rng.normal(0, noise, 2)
            losses = (float(9 - gain[0]), float(9 - gain[1]))
            sites.append(MeasuredSite(number, "attn.q", losses, scores))
        settings[name] = Setting(name, 1e-3, 10, (9.0, 9.0), tuple(sites))
    return Measured("", "", {}, 4, settings)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_score_that_tells_more_than_depth_is_chosen(sign: int) -> None:
    found = worths(_measured("two", sign))
    assert best_score(found) == "two"
    assert found["two"].sign == sign
    assert found["two"].mean.value * sign > 0.9
    assert found["two"].beyond_depth.low > 0.4
    assert not found["one"].mean.is_certain
    assert found["one"].least == 0.0


def test_depth_is_chosen_where_it_tells_most_or_nothing_tells() -> None:
    assert best_score(worths(_measured("depth"))) == "depth"
    assert best_score(worths(_measured("two", noise=1000.0))) == "depth"


def test_seeds_that_agree_leave_more_to_tell() -> None:
    steady, noisy = (_measured("two", noise=noise).settings["a"] for noise in (0.01, 100.0))
    assert steady.agreement() > 0.95 > noisy.agreement()
    assert steady.gains().shape == (24, 2)
