"""Errors: each is one line that gives the field, the value, the problem and the remedy."""

from __future__ import annotations

import re


def printable(text: str) -> str:
    """Return text that a terminal shows and does not obey: `?` for each control character.

    Names of models and columns, labels and errors of libraries come from files of others. A line
    end stays one; characters that reverse the direction of writing, and halves of surrogate pairs,
    are replaced too.

    Example:
        >>> from autopeft.errors import printable
        >>> printable("label" + chr(27) + "[2J")
        'label?[2J'
    """
    return _UNPRINTABLE.sub("?", text)


_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class AutoPeftError(Exception):
    """Base class of the errors that autopeft raises.

    Attributes:
        exit_status: The command line's exit status after this error.

    Example:
        >>> TrainingFailure("loss is NaN at step 20").exit_status
        1
    """

    exit_status = 1

    def __str__(self) -> str:
        """Return the text without control characters, which a terminal would obey."""
        return printable(super().__str__())


class UserError(AutoPeftError):
    """A mistake that the user can fix; shown as one line, never as a traceback.

    Args:
        field: The setting, column, file or flag that is wrong.
        value: Its value.
        problem: What is wrong: the rule that must hold.
        remedy: What the user can do.

    Example:
        >>> print(UserError("steps", 0, "`steps >= 1` must hold", "use 1 or more"))
        steps=0: `steps >= 1` must hold; use 1 or more
    """

    exit_status = 2

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        self.field = field
        self.value = value
        self.problem = problem
        self.remedy = remedy
        super().__init__(" ".join(f"{self.mistake}; {remedy}".splitlines()))

    def __reduce__(self) -> tuple[type[UserError], tuple[str, object, str, str]]:
        """Let it travel from a worker: by default, it would be made again from its text alone."""
        return type(self), (self.field, self.value, self.problem, self.remedy)

    @property
    def mistake(self) -> str:
        """The error without its remedy."""
        return f"{self.field}={self.value!r}: {self.problem}"


class SettingsError(UserError):
    """A setting has an impossible value, or two settings contradict each other."""


class SpaceError(UserError):
    """The search space or a plan has an impossible method, role, layer, rank or value."""


class DataError(UserError):
    """The data cannot be read, lacks a column, or is not enough to learn from."""


class ModelError(UserError):
    """The model cannot be loaded, or is not a transformer that autopeft supports."""


class StorageError(UserError):
    """The study's storage, the output folder or a file in it cannot be used."""


class StorageFailure(AutoPeftError):
    """The storage of a study stopped working in mid-search; nothing that was told is lost.

    Args:
        place: The storage, for people.
        reason: What the database said.
        seconds: How long it was asked again.

    Example:
        >>> StorageFailure("study.db", "database or disk is full").exit_status
        1
    """

    def __init__(self, place: str, reason: str, seconds: float = 0.0) -> None:
        self.place = place
        self.reason = reason
        self.seconds = seconds
        tried = f", for {seconds:.0f} seconds" if seconds >= 1.0 else ""
        super().__init__(
            f"storage {place}: {reason}{tried}; what was told is saved: `autopeft resume` "
            "continues once it works"
        )

    def __reduce__(self) -> tuple[type[StorageFailure], tuple[str, str, float]]:
        """Let it travel: by default, it would be made again from its text alone."""
        return type(self), (self.place, self.reason, self.seconds)


class AdapterError(UserError):
    """A saved adapter is damaged, unsafe, or does not fit the base model."""


class TrainingFailure(AutoPeftError):
    """A trial could not be trained (diverged, out of memory); the search continues."""


class OutOfTime(TrainingFailure):
    """A training reached its deadline between two steps; it counts as stopped, not as failed."""


class MultiAdapterError(AutoPeftError):
    """These candidates cannot be trained together on one base model; train them one by one."""


class SearchInterrupted(KeyboardInterrupt):
    """A search was stopped by Ctrl-C, SIGTERM or SIGHUP; the text says what was saved."""
