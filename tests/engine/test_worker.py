"""What a worker imports before its first step."""

from __future__ import annotations

import subprocess
import sys


def loaded(code: str, *names: str) -> list[str]:
    """Which of the modules are there after the code."""
    code += f"; import sys; print(*[name for name in {names} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    return done.stdout.split()


def test_ray_finds_the_actor_without_torch() -> None:
    code = "import autopeft.engine.worker"
    assert loaded(code, "ray.tune", "torch", "transformers", "peft", "optuna") == ["ray.tune"]


def test_stops_are_heard_without_torch() -> None:
    assert loaded("import autopeft.engine.stops", "ray", "ray.tune", "torch") == ["ray"]


def test_the_bench_knows_nothing_of_the_search() -> None:
    code = "import autopeft.engine.workbench"
    names = ("torch", "autopeft.search", "optuna", "sqlalchemy", "sklearn", "scipy.stats", "ray")
    assert loaded(code, *names) == ["torch"]
