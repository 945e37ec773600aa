"""The errors a user can meet, each one line: what field, what value, what to do."""

from __future__ import annotations


class AutoPeftError(Exception):
    """Base of every error autopeft raises on purpose.

    Attributes:
        exit_status: What the command line exits with when this error ends it.
    """

    exit_status = 1


class UserError(AutoPeftError):
    """A mistake in what the user asked for; shown as one line, never as a traceback.

    Args:
        field: The setting, column, file or flag that is wrong.
        value: What was found there.
        problem: What is wrong, stating the rule that must hold.
        remedy: What the user can do about it.
    """

    exit_status = 2

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        self.field = field
        self.value = value
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{field}={value!r}: {problem}; {remedy}".replace("\n", " "))


class SettingsError(UserError):
    """A setting has an impossible value, or two settings contradict each other."""


class SpaceError(UserError):
    """The search space names a method, role, layer or rank that cannot be."""


class DataError(UserError):
    """The data cannot be read, lacks a column, or cannot be learned from."""


class ModelError(UserError):
    """The model cannot be loaded, or is not a transformer autopeft can adapt."""


class StorageError(UserError):
    """The study's storage or the output folder cannot be used."""


class AdapterError(UserError):
    """A saved adapter is damaged, unsafe, or does not fit the base model."""


class TrainingFailure(AutoPeftError):
    """One trial could not be trained (diverged, out of memory); the search goes on."""


class PackingError(AutoPeftError):
    """Candidates cannot share one forward pass of this model; they train one after another."""
