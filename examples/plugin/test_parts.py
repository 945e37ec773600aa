"""Each part keeps its contract; run with `pytest` after `pip install .`."""

from autopeft.testing import (
    check_backend,
    check_cost,
    check_method,
    check_metric,
    check_pruner,
    check_task,
)

POSTS = [{"post": f"{'great ' * (n % 4)}film {n}", "likes": n % 4} for n in range(60)]


def test_the_parts_keep_their_contracts() -> None:
    check_method("gaussian_lora")
    check_metric("within_one")
    check_cost("download_seconds")
    check_pruner("outclassed")
    check_task("likes", POSTS)


def test_the_backend_keeps_its_contract() -> None:
    check_backend("processes")
