"""The public names: all there, and light to import."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import autopeft


def test_every_public_name_resolves() -> None:
    for name in autopeft.__all__:
        assert getattr(autopeft, name) is not None


def test_all_lists_every_home() -> None:
    assert set(autopeft.__all__) == {*autopeft._HOMES, "__version__"}


def test_import_loads_nothing_heavy(fresh_python: Callable[[str], str]) -> None:
    code = (
        "import sys; before = set(sys.modules); import autopeft;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    assert fresh_python(code) == "['autopeft']"


def test_a_mistaken_setting_is_told_before_anything_heavy_loads(
    fresh_python: Callable[[str], str],
) -> None:
    code = (
        "import sys, autopeft\n"
        "try: autopeft.search(model='m', data='d', output='o', stepz=3)\n"
        "except autopeft.UserError as error: print(error)\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'optuna') if m in sys.modules])"
    )
    first, *_, last = fresh_python(code).splitlines()
    assert "stepz" in first
    assert last == "[]"


def test_a_controller_needs_no_torch(fresh_python: Callable[[str], str]) -> None:
    code = (
        "import sys, autopeft;"
        "t = autopeft.Topology(4, {'attn.q': (64, 64), 'attn.v': (64, 64)});"
        "s = autopeft.SearchSpace.from_source({'methods': ['lora', 'ia3']}, t);"
        "c = autopeft.SearchController(s, ['accuracy', 'trainable_params']);"
        "trial = c.ask(); d = c.report(trial, 10, 0.5); c.tell(trial, score=0.7);"
        "print(len(c.front()), d is autopeft.Decision.CONTINUE,"
        "[m for m in ('torch', 'ray', 'transformers', 'peft') if m in sys.modules])"
    )
    assert fresh_python(code) == "1 True []"


def test_pruning_any_study_needs_optuna_alone(fresh_python: Callable[[str], str]) -> None:
    code = (
        "import sys, optuna; before = set(sys.modules);"
        "from autopeft import GapPruner, PrunableTrial, prunable;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names)),"
        "[name for name in sys.modules if name.startswith('autopeft.costs')])"
    )
    assert fresh_python(code) == "['autopeft', 'msgspec', 'numpy', 'typing_extensions'] []"


def test_search_and_report_are_plain_functions() -> None:
    for name in ("search", "report"):
        assert inspect.isfunction(getattr(autopeft, name))
