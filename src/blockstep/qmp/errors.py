"""Which error becomes which QMP class, and back: what a peer's refusal looks like here.

QMP knows five classes; clients are told to look at the class and to show the description. `CommandError` is for
commands that must answer with a particular class; every other error finds its class by its type:

    CommandError                its own
    NodeNotFound                DeviceNotFound
    JobNotFound                 DeviceNotActive
    BlockstepError, OSError     GenericError, the sentence of the error
    anything else               GenericError; it is a bug, and the server reports it as one

Source: QMP specification, section "Error"; the classes are QapiErrorClass of QEMU's QAPI reference.
"""

from __future__ import annotations

from typing import Final, Literal

from blockstep.errors import BlockstepError, JobNotFound, NodeNotFound, PeerRefused, told

ErrorClass = Literal["GenericError", "CommandNotFound", "DeviceNotActive", "DeviceNotFound", "KVMMissingCap"]

_CLASSES: Final[tuple[tuple[type[Exception], ErrorClass], ...]] = (
    (NodeNotFound, "DeviceNotFound"),
    (JobNotFound, "DeviceNotActive"),
)


class CommandError(BlockstepError):
    """A command refuses, with the class that clients of QEMU expect of it."""

    def __init__(self, description: str, error_class: ErrorClass = "GenericError") -> None:
        super().__init__(description)
        self.description, self.error_class = description, error_class


class CommandRefused(PeerRefused):
    """The peer answered a command with an error. ``error_class`` is QMP's class, ``description`` is for people."""

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"{command}: {description}")
        self.command, self.error_class, self.description = command, error_class, description


def describe(error: BaseException) -> tuple[ErrorClass, str]:
    """QMP's class and description of an error that a command raised."""
    if isinstance(error, CommandError):
        return error.error_class, error.description
    for kind, error_class in _CLASSES:
        if isinstance(error, kind):
            return error_class, told(error)
    if is_expected(error):
        return "GenericError", told(error)
    return "GenericError", f"internal error: {type(error).__name__}: {error}"


def is_expected(error: BaseException) -> bool:
    """Whether this is an error that commands may raise, not a bug of ours."""
    return isinstance(error, (BlockstepError, OSError))
