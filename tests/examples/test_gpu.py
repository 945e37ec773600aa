"""The benchmark of a GPU: on this machine's, or as far as a CPU can tell."""

from __future__ import annotations

import gpu
import pytest
import torch

from autopeft import methods

BENCHMARKED = ("activation cache, upper half adapted", "trials")


def test_every_method_has_a_place_in_the_decoders() -> None:
    with gpu.bench("tiny", "cpu", 1) as bench:
        for method in methods.all_methods():
            plan = gpu.plan_of(bench, method.name)
            assert plan is not None, method.name
            assert set(plan.methods) == {method.name}


def test_a_machine_without_a_gpu_can_check_the_command() -> None:
    with gpu.bench("tiny", "cpu", 1) as bench:
        cache, trials = (gpu.TABLES[title](bench) for title in BENCHMARKED)
    assert [row["cache"] for row in cache] == ["without", "with"]
    assert float(cache[1]["gain"]) > 0
    assert float(trials[0]["trials an hour"]) > 0


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs a GPU")
def test_prices_are_what_the_gpu_holds() -> None:
    with gpu.bench("0.5B", str(torch.accelerator.current_accelerator()), 2) as bench:
        rows = gpu.TABLES["memory, priced and allocated"](bench)
    ratios = {row["method"]: float(row["priced/allocated"]) for row in rows}
    assert all(0.9 <= ratio <= 1.1 for ratio in ratios.values()), ratios
