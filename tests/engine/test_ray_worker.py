"""What a worker imports before its first step."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.parametrize(
    ("module", "names", "expected"),
    [
        ("ray_worker", ("ray.tune", "torch", "transformers", "peft", "optuna"), "ray.tune"),
        ("local_backend", ("torch", "ray"), "torch"),
        (
            "executor",
            ("torch", "autopeft.searcher", "optuna", "sqlalchemy", "sklearn", "scipy.stats", "ray"),
            "torch",
        ),
    ],
)
def test_only_what_is_needed_is_loaded(
    fresh_python: Callable[[str], str], module: str, names: tuple[str, ...], expected: str
) -> None:
    code = f"import autopeft.engine.{module}, sys;"
    code += f"print(*[name for name in {names} if name in sys.modules])"
    assert fresh_python(code) == expected
