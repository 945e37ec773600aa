"""Registries: the one door for parts of a kind, whether built in, installed or a user's own."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from autopeft.errors import AutoPeftError, SettingsError, UserError
from autopeft.utils.directory import working_directory
from autopeft.utils.formatting import one_line
from autopeft.utils.serialize import nearest

T = TypeVar("T")

_REGISTRIES: dict[str, Registry[Any]] = {}
"""Group of entry points -> its registry."""


@dataclass(frozen=True)
class _Item:
    """What a name stands for: an object, or a path until it is first used.

    Attributes:
        value: The object; None until the path is imported.
        path: Where it is found as `module:name`, if it was registered so.
        package: The installed package whose entry point it is; "" for others.
    """

    value: Any = None
    path: str = ""
    package: str = ""

    def __str__(self) -> str:
        origin = f" of the package {self.package}" if self.package else ""
        return (self.path or describe(self.value)) + origin


@contextmanager
def blamed(
    field: str,
    shown: str,
    problem: str,
    remedy: str = "correct it",
    passing: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Turn an error of a user's part into a SettingsError that names it.

    Args:
        field: The setting.
        shown: Its value, for people.
        problem: What fails; the error is added.
        remedy: What to do.
        passing: Errors that are not the part's.
    """
    others: tuple[type[Exception], ...] = (AutoPeftError, *passing)
    try:
        yield
    except others:
        raise  # One of autopeft's says itself what is wrong, and of what.
    except Exception as error:
        raise SettingsError(field, shown, f"{problem} ({one_line(error)})", remedy) from error


class Registry(Mapping[str, T], Generic[T]):
    """Parts of one kind by name, in the order in which they were registered.

    As a mapping, it holds what was registered and the entry points of its group. Those are listed
    when first needed, and imported when used.

    Args:
        kind: What a part is called in messages.
        group: Group of entry points that are parts.
        home: The module that makes the registry; a worker imports it to restore what was
            registered.
        accept: Returns the part that an object stands for, given its name or "" and the object;
            raises a TypeError that says what it must be.
        error: Class of the errors.
        keeps_given: Whether objects that settings named stay registered; else only the last does.
        is_carried: Whether workers need the parts.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        home: str,
        accept: Callable[[str, Any], T],
        error: type[UserError] = SettingsError,
        *,
        keeps_given: bool = True,
        is_carried: bool = True,
    ) -> None:
        self.is_carried = is_carried
        self.kind = kind
        self.group = group
        self.home = home
        self._accept = accept
        self._error = error
        self._items: dict[str, _Item] = {}
        self._installed: dict[str, _Item] | None = None
        self._broken: set[str] = set()
        self._given: set[str] = set()
        self._keeps_given = keeps_given
        _REGISTRIES[group] = self

    # Registering

    def register(self, name: str, part: Any) -> None:
        """Register a part, or the path `module:name` where it is found when first used.

        A definition that is run again, as in a notebook, replaces the earlier one.

        Raises:
            UserError: if the name stands for another part, or the object cannot be a part.
        """
        if not isinstance(name, str) or not name or set(name) & set(":, =<>"):
            problem = "a name must be text without spaces, colons, commas and signs"
            raise self._error(self.kind, name, problem, "rename it")
        if isinstance(part, str):
            item = _Item(path=part)
        else:
            item = _Item(self._accepted(self.kind, name, part))
        known = self._items.get(name) or (self._installed or {}).get(name)
        if known is not None and not _is_same(known, item):
            raise self._error(
                self.kind, name, f"the name is registered twice: {known} and {item}", "rename one"
            )
        self._items[name] = item

    def forget(self, name: str) -> None:
        """Take out a part that was registered; entry points stay."""
        self._items.pop(name, None)

    def door(
        self, name: Any = None, part: Any = None, wrap: Callable[[Any], Any] = lambda p: p
    ) -> Any:
        """Register a part as a call or as a decorator, and return it unchanged.

        Args:
            name: The name, or the part if it has a name of its own; None: the decorated part's.
            part: The part, or the path `module:name`; None: a decorator for the part is returned.
            wrap: Makes of an object what is registered.
        """
        if name is not None and not isinstance(name, str):
            name, part = _own_name(name), name
        if part is None:
            return lambda part: self.door(name or _own_name(part), part, wrap)
        try:
            made = part if isinstance(part, str) else wrap(part)
        except TypeError as wrong:
            raise self._error(self.kind, name, str(wrong), "correct it") from None
        self.register(name, made)
        return part

    def _accepted(self, field: str, name: str, part: Any, *, shown: str = "") -> T:
        try:
            return self._accept(name, part)
        except TypeError as wrong:
            shown = shown or name or describe(part)
            raise self._error(field, shown, str(wrong), "correct it") from None

    # Reading

    def resolve(self, field: str, value: Any) -> T:
        """Return the part that a setting's value stands for.

        Args:
            field: The setting.
            value: A registered name, `package.module:name`, or the object itself.

        Raises:
            UserError: if there is no such part, or it cannot be imported.
        """
        if not isinstance(value, str):
            return self._accepted(field, "", value)
        if ":" in value:
            part = import_object(field, value, error=self._error)
            return self._accepted(field, "", part, shown=value)
        if value not in self:
            names = [*self]
            raise self._error(field, value, f"no such {self.kind}", nearest(value, names))
        return self._load(field, value)

    def check(self, field: str, value: str) -> None:
        """Check that a setting's text stands for a part; a registered one is not imported yet.

        Raises:
            UserError: if there is no such part, or it cannot be imported.
        """
        if value not in self:
            self.resolve(field, value)

    def check_known(self, field: str, value: str, *, example: str = "...") -> None:
        """Check that the text that a search kept still stands for a part.

        Raises:
            UserError: if it was an object that only the process knew that began the search.
        """
        if ":" not in value and value not in self:
            problem = (
                f"no module holds the {self.kind} of this search, and none of that name is "
                "registered"
            )
            remedy = f"give it again in Python: autopeft.resume(folder, {field}={example})"
            raise self._error(field, value, problem, remedy)

    def text(self, field: str, value: Any) -> str:
        """Return the text by which settings name a part that may be given as an object.

        An object that no other process could import is registered under its own name.

        Raises:
            UserError: if it cannot be a part, or its name stands for another part.
        """
        if isinstance(value, str):
            return value
        part = self._accepted(field, "", value)
        found = spelling(value)
        if found is not None:
            return found
        name = (_own_name(part) or type(part).__name__).strip("<>")
        # A notebook's cell may be run again.
        for given in {name} & self._given if self._keeps_given else self._given:
            self._items.pop(given, None)
        self.register(name, value)
        self._given.add(name)
        return name

    def _load(self, field: str, name: str) -> T:
        item = self._item(name)
        if item.value is None:
            found = import_object(field, item.path, shown=str(item), error=self._error)
            item = _Item(self._accepted(field, name, found), item.path, item.package)
            if item.package:
                self._entries[name] = item
            else:
                self._items[name] = item
        part: T = item.value
        return part

    def _item(self, name: str) -> _Item:
        return self._items[name] if name in self._items else self._entries[name]

    @property
    def _entries(self) -> dict[str, _Item]:
        """The entry points of the group, read once; their objects are not imported yet."""
        if self._installed is None:
            self._installed = {}
            for entry in entry_points(group=self.group):
                self._install(entry)
        return self._installed

    def _install(self, entry: EntryPoint) -> None:
        assert self._installed is not None
        package = entry.dist.name if entry.dist is not None else ""
        item = _Item(path=entry.value, package=package or "unknown")
        known = self._items.get(entry.name) or self._installed.get(entry.name)
        if known is None:
            self._installed[entry.name] = item
        elif str(known) != str(item):  # A package may be found twice on the path.
            self._warn(entry.name, f"{item} is left out: the name is taken by {known}")

    def _warn(self, name: str, text: str) -> None:
        warnings.warn(f"{self.kind} {name}: {text}", stacklevel=2)

    @property
    def registered(self) -> tuple[str, ...]:
        """The names that were registered, entry points not among them: they take time to read."""
        return tuple(self._items)

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise KeyError(name)
        return self._load(self.kind, name)

    def __contains__(self, name: object) -> bool:
        return name in self._items or (isinstance(name, str) and name in self._entries)

    def __iter__(self) -> Iterator[str]:
        """Yield every name but those of parts that turned out not to be importable."""
        yield from (name for name in [*self._items, *self._entries] if name not in self._broken)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def parts(self) -> tuple[T, ...]:
        """Return every part; one that cannot be imported is named in a warning and left out."""
        found = []
        for name in self:
            try:
                found.append(self._load(self.kind, name))
            except UserError as error:
                self._broken.add(name)
                self._warn(name, f"{error.mistake}; it is left out")
        return tuple(found)


def _own_name(part: Any) -> str:
    own = getattr(part, "name", None)
    return own if isinstance(own, str) else str(getattr(part, "__name__", ""))


def _is_same(known: _Item, item: _Item) -> bool:
    """Return whether two registrations are of one part, or of one definition that was run again."""
    if known.path or item.path:
        return known.path == item.path
    if known.value is item.value:
        return True
    mine, other = _definition(known.value), _definition(item.value)
    return mine == other and mine is not None


def _definition(part: Any) -> tuple[str, str] | None:
    """Return module and name of what defines a part; None for an anonymous one."""
    ways = (getattr(part, name, None) for name in ("function", "measure", "meter"))
    made = next(filter(None, ways), part if hasattr(part, "__qualname__") else type(part))
    if isinstance(made, str):
        return "", made
    module, name = getattr(made, "__module__", None), getattr(made, "__qualname__", "")
    return None if not module or name.endswith("<lambda>") else (module, name)


def describe(part: Any) -> str:
    """Return how messages name an object: `module:name`, or its class's."""
    kind = part if hasattr(part, "__qualname__") else type(part)
    text = f"{kind.__module__}:{kind.__qualname__}"
    return text if kind is part else f"a {text}"


def import_object(
    field: str, path: str, *, shown: str = "", error: type[UserError] = SettingsError
) -> Any:
    """Return the object at `package.module:name`; modules in the current folder are found too.

    Args:
        field: What the error names.
        path: Module and name; the name may have dots.
        shown: The value that the error names; by default the path.
        error: Class of the error.

    Raises:
        UserError: of class `error`, if it cannot be imported.
    """
    shown = shown or path
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise error(field, shown, "must be a name or package.module:name", "correct it")
    folder = working_directory()
    is_new = bool(folder) and folder not in sys.path
    if is_new:
        sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        found = importlib.import_module(module_name)
    except Exception as wrong:
        if is_new and folder in sys.path:  # The module may have changed it.
            sys.path.remove(folder)
        reason = one_line(wrong)
        raise error(
            field,
            shown,
            f"the module {module_name} cannot be imported ({reason})",
            "install it, or run in the folder that holds it",
        ) from wrong
    for step in name.split("."):
        if not hasattr(found, step):
            known = [each for each in vars(found) if not each.startswith("_")]
            close = nearest(step, known) if known else "correct it"
            raise error(field, shown, f"{module_name} has no {step!r}", close)
        found = getattr(found, step)
    return found


def spelling(part: Any) -> str | None:
    """Return `module:name`, by which another process or a resumed search finds an object.

    None if there is none: a lambda, a function inside a function, an object of a notebook or of the
    main script, or an instance. Those travel by value (`carried`).
    """
    module, name = getattr(part, "__module__", None), getattr(part, "__qualname__", None)
    if not module or not name or module == "__main__" or "<" in name:
        return None
    found: Any = sys.modules.get(module)
    for step in name.split("."):
        found = getattr(found, step, None)
    return f"{module}:{name}" if found is part else None


@dataclass(frozen=True)
class Carried:
    """What a process knows beyond what is installed, to be restored in another one.

    Attributes:
        folders: Where modules are found.
        parts: Home, group and name of each registered part, and the part, pickled by value where
            another process cannot import it.
    """

    folders: tuple[str, ...]
    parts: tuple[tuple[str, str, str, bytes], ...]


def carried(*, without: Collection[str] = ()) -> Carried:
    """Return what was registered in this process, for `restore` in a worker.

    Entry points are left out: a worker reads them itself. So are the groups in `without`.

    Raises:
        UserError: if a part cannot be pickled.
    """
    import cloudpickle  # Rarely needed, and every process imports this module.

    parts = []
    for group, registry in _REGISTRIES.items():
        if group in without or not registry.is_carried:
            continue
        for name, item in registry._items.items():
            try:
                content = cloudpickle.dumps(item.path or item.value)
            except Exception as wrong:
                raise registry._error(
                    registry.kind,
                    name,
                    f"cannot be sent to a worker ({type(wrong).__name__}: {wrong})",
                    "define it at the top level of a module",
                ) from wrong
            parts.append((registry.home, group, name, content))
    here = working_directory()
    folders = dict.fromkeys(os.path.join(here, folder) for folder in [*sys.path, here])
    found = (os.path.normpath(folder) for folder in folders if os.path.isdir(folder))
    return Carried(tuple(dict.fromkeys(found)), tuple(parts))


def restore(sent: Carried) -> None:
    """Register in this process what another one carried; what is here already stays."""
    import cloudpickle

    sys.path.extend(folder for folder in sent.folders if folder not in sys.path)
    for home, group, name, content in sent.parts:
        importlib.import_module(home)
        registry = _REGISTRIES[group]
        if name not in registry._items:
            registry.register(name, cloudpickle.loads(content))
