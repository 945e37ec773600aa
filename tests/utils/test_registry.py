"""A registry finds parts by name, path or as objects, whoever brings them."""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from autopeft.errors import SettingsError
from autopeft.utils import registry
from autopeft.utils.registry import Registry, carried, import_object, restore, spelling

Part = Callable[[], int]


def _as_part(name: str, part: Any) -> Part:
    if not callable(part):
        raise TypeError("must be a function")
    found: Part = part
    return found


def one() -> int:
    return 1


def two() -> int:
    return 2


@pytest.fixture
def parts() -> Iterator[Registry[Part]]:
    yield Registry("part", "test.parts", __name__, _as_part)
    registry._REGISTRIES.pop("test.parts", None)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make some entry points of a package that is not there."""

    def install(**paths: str) -> None:
        found = [EntryPoint(name, path, "test.parts") for name, path in paths.items()]
        monkeypatch.setattr(registry, "entry_points", lambda group: found)

    return install


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, which is not on the path, with a module `own_parts`."""
    known = {*sys.modules}
    (tmp_path / "own_parts.py").write_text(
        "class Box:\n    def three(): return 3\n\ndef four(): return 4\n", encoding="utf-8"
    )
    (tmp_path / "broken_parts.py").write_text("import nothing_of_this_name\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in {*sys.modules} - known:
        if name.endswith("_parts"):
            del sys.modules[name]


def test_a_part_is_found_by_name_by_path_and_as_itself(parts: Registry[Part], folder: Path) -> None:
    parts.register("one", one)
    assert parts.resolve("field", "one") is one
    assert parts.resolve("field", two) is two
    assert parts.resolve("field", "own_parts:four")() == 4
    assert parts.resolve("field", "own_parts:Box.three")() == 3


def test_a_registered_path_is_imported_when_it_is_used(parts: Registry[Part], folder: Path) -> None:
    parts.register("four", "own_parts:four")
    assert "four" in parts
    assert "own_parts" not in sys.modules
    assert parts["four"]() == 4


def test_the_door_is_a_call_and_a_decorator(parts: Registry[Part]) -> None:
    assert parts.door("first", one) is one
    assert parts.door(two) is two

    def three() -> int:
        return 3

    assert parts.door("third")(three) is three
    assert [*parts] == ["first", "two", "third"]
    assert parts["third"] is three


def test_an_unknown_name_gets_the_nearest(parts: Registry[Part]) -> None:
    parts.register("accuracy", one)
    with pytest.raises(SettingsError, match="metric='acuracy': no such part; did you mean 'accur"):
        parts.resolve("metric", "acuracy")


def test_a_name_is_taken_once(parts: Registry[Part]) -> None:
    parts.register("one", one)
    parts.register("one", one)
    with pytest.raises(SettingsError, match=r"registered twice: \S*:one and \S*:two; rename one"):
        parts.register("one", two)
    with pytest.raises(SettingsError, match=r"registered twice: \S*:one and some.module:one"):
        parts.register("one", "some.module:one")
    assert parts["one"] is one


def test_a_definition_that_is_run_again_replaces_the_first(parts: Registry[Part]) -> None:
    for value in (1, 2):
        space: dict[str, Any] = {"__name__": "__main__"}
        exec(f"def cell(): return {value}", space)
        parts.register("cell", space["cell"])
    assert parts["cell"]() == 2


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a,b", "a<b"])
def test_a_name_that_settings_could_not_hold_is_refused(parts: Registry[Part], name: str) -> None:
    with pytest.raises(SettingsError, match="a name must be text"):
        parts.register(name, one)


def test_an_object_of_the_wrong_kind_is_refused(parts: Registry[Part]) -> None:
    with pytest.raises(SettingsError, match="part='one': must be a function"):
        parts.register("one", 1)
    with pytest.raises(SettingsError, match="field='a builtins:int': must be a function"):
        parts.resolve("field", 1)
    with pytest.raises(SettingsError, match="must be a function"):
        parts.resolve("field", "math:pi")


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("nothing_of_this_name:f", "nothing_of_this_name cannot be imported .ModuleNotFoundError"),
        ("broken_parts:f", "broken_parts cannot be imported .ModuleNotFoundError: No module named"),
        ("own_parts:fuor", "own_parts has no 'fuor'; did you mean 'four'"),
        ("own_parts:", "must be a name or package.module:name"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_line(folder: Path, path: str, problem: str) -> None:
    before = [*sys.path]
    with pytest.raises(SettingsError, match=problem) as error:
        import_object("metric", path)
    assert "\n" not in str(error.value)
    assert sys.path[: len(before)] == before


def test_entry_points_are_parts_and_imported_when_used(
    parts: Registry[Part], folder: Path, installed: Callable[..., None]
) -> None:
    installed(four="own_parts:four")
    parts.register("one", one)
    assert [*parts] == ["one", "four"]
    assert parts.registered == ("one",)
    assert "own_parts" not in sys.modules
    assert parts.resolve("field", "four")() == 4


def test_an_entry_point_that_does_not_import_is_named_and_the_rest_works(
    parts: Registry[Part], folder: Path, installed: Callable[..., None]
) -> None:
    installed(bad="broken_parts:f", four="own_parts:four")
    with pytest.warns(
        UserWarning, match=r"broken_parts:f of the package.*; it is left out"
    ) as seen:
        assert [part() for part in parts.parts()] == [4]
    assert len(seen) == 1
    assert [*parts] == ["four"]
    assert [part() for part in parts.parts()] == [4]  # Told once.
    with pytest.raises(SettingsError, match="broken_parts cannot be imported"):
        parts.resolve("field", "bad")


def test_an_installed_package_brings_parts(
    folder: Path, fresh_python: Callable[[str], str]
) -> None:
    about = folder / "own_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: own-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[autopeft.costs]\nrent = own_parts:four\nbad = broken_parts:f\n"
        "[autopeft.metrics]\naccuracy = own_parts:four\n"
    )
    code = (
        f"import sys, warnings; sys.path.append({str(folder)!r})\n"
        "import autopeft; from autopeft.costs.objectives import COSTS\n"
        "from autopeft.tasks.metrics import METRICS\n"
        "print('own_parts' in sys.modules, COSTS['rent'].name, 'own_parts' in sys.modules)\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    n_installed = len(COSTS.parts()) - len(COSTS.registered)\n"
        "    print(n_installed, METRICS['accuracy'].direction, [*METRICS][:2])\n"
        "for each in seen: print(each.message)"
    )
    first, second, *warned = fresh_python(code).splitlines()
    assert first == "False rent True"
    assert second == "1 maximize ['loss', 'perplexity']"
    assert len(warned) == 2
    assert "broken_parts:f of the package own-package" in warned[0]
    assert "own_parts:four of the package own-package is left out" in warned[1]


def test_an_entry_point_does_not_take_a_name(
    parts: Registry[Part], installed: Callable[..., None]
) -> None:
    installed(one="own_parts:four")
    parts.register("one", one)
    with pytest.warns(UserWarning, match=r"own_parts:four of the package.*name is taken by.*:one"):
        assert len(parts) == 1
    assert parts["one"] is one


def test_the_spelling_of_an_object_is_where_it_is_imported_from() -> None:
    assert spelling(Path) == f"{Path.__module__}:Path"
    assert spelling(EntryPoint.load) == "importlib.metadata:EntryPoint.load"
    assert spelling(lambda: 1) is None
    assert spelling(Path()) is None
    module = types.ModuleType("__main__")
    exec("def own(): return 1", vars(module))
    assert spelling(module.own) is None


def test_settings_hold_the_spelling_or_a_name(parts: Registry[Part]) -> None:
    assert parts.text("field", "anything") == "anything"
    assert parts.text("field", Path) == f"{Path.__module__}:Path"
    for value in (1, 2):  # A cell of a notebook that is run again.
        assert parts.text("field", lambda value=value: value) == "lambda"
        assert parts["lambda"]() == value


def test_what_was_registered_travels_to_another_process(
    parts: Registry[Part], folder: Path, fresh_python: Callable[[str], str], tmp_path: Path
) -> None:
    import autopeft

    factor = 3
    autopeft.register_cost("carried_cost", lambda price, plan: factor * price.adapter_bytes)
    autopeft.register_cost("imported_cost", "own_parts:four")
    (tmp_path / "sent").write_bytes(pickle.dumps(carried()))
    code = (
        "import os, pickle; os.chdir('/')\n"
        f"sent = pickle.load(open({str(tmp_path / 'sent')!r}, 'rb'))\n"
        "from autopeft.utils.registry import restore; restore(sent); restore(sent)\n"
        "from autopeft.costs.objectives import COSTS; from autopeft.costs import Price\n"
        "print(COSTS['carried_cost'].of(Price(1, 7, 1.0, 1), None),"
        "COSTS['imported_cost'].function())"
    )
    assert fresh_python(code) == "21.0 4"
    from autopeft.costs.objectives import COSTS

    for name in ("carried_cost", "imported_cost"):
        del COSTS._items[name]


def test_what_cannot_travel_is_named(parts: Registry[Part]) -> None:
    stream = (n for n in range(3))  # No generator can be pickled.
    parts.register("stream", lambda: next(stream))
    with pytest.raises(SettingsError, match="part='stream': cannot be sent to a worker"):
        carried()


def test_restoring_keeps_what_is_here(parts: Registry[Part]) -> None:
    parts.register("one", one)
    sent = carried()
    del parts._items["one"]
    parts.register("one", two)
    restore(sent)
    assert parts["one"] is two
