"""Everything that can go wrong, one class per cause.

A message says what is wrong, where, and what to do. `InputError` and its children mean that the caller asked for
something impossible (exit code 2 on the command line); any other `WorkbenchError` means that the work failed (exit code
1).
"""

from __future__ import annotations

from typing import Any


class WorkbenchError(Exception):
    """Base of every error that the workbench raises on purpose."""

    exit_code = 1


class InputError(WorkbenchError, ValueError):
    """The request itself is wrong: nothing was started, nothing was changed."""

    exit_code = 2


class UnknownMethod(InputError):
    """No method is registered under this key."""


class UnknownTask(InputError):
    """No kind of task has this key."""


class PluginConflict(InputError):
    """Two installed packages offer methods under the same key."""


class BadParameter(InputError):
    """A parameter does not exist, has the wrong type, or lies out of its bounds."""


class BadBudget(InputError):
    """A budget that cannot be read or is out of range."""


class BudgetTooSmall(InputError):
    """The method cannot get below this many bytes; the message names the smallest budget that works."""

    def __init__(self, message: str, smallest: float) -> None:
        super().__init__(message)
        self.smallest = smallest


class BadRecipe(InputError):
    """Methods that do not make sense together."""


class NotApplicable(InputError):
    """A method cannot be applied to this model or this prompt."""


class NoRotation(NotApplicable):
    """A model or layer whose queries and keys are not rotated by their positions."""


class OutOfRange(NotApplicable):
    """Numbers too large for the precision in which they would have to be held."""


class BadPrompt(InputError):
    """Text, messages or ids that cannot be read."""


class PromptTooLong(BadPrompt):
    """More tokens than the model has positions."""


class NotRead(InputError):
    """Something was asked of a session that has not read a prompt yet."""


class ModelNotFound(InputError):
    """No model under this name, folder or hub id."""


class ModelNotOffered(InputError):
    """A served workbench does not load this model for its visitors."""


class CheckpointRefused(InputError):
    """A checkpoint in a format that can run code, or one that is broken."""


class DownloadFailed(WorkbenchError):
    """A download did not arrive whole or did not have the expected checksum."""


class CalibrationFailed(WorkbenchError):
    """What was seen of a layer's inputs on the calibration texts does not determine how to compress it."""


class MissingExtra(InputError):
    """An optional dependency is needed; the message says which extra to install."""


class Cancelled(WorkbenchError):
    """The work was cancelled by the user.

    finished: what was done before that, where there is something to keep: the rows of `Session.compare`, a DataFrame.
    """

    exit_code = 130
    finished: Any = None
