"""What can go wrong, sorted by what the one who catches it can do next.

I/O errors are not here: a request that failed raises plain `OSError` with an errno, the language of disks, of
the NBD protocol and of Python. Everything else is a `BlockstepError` and carries its facts as fields, so that
the control socket and the commands can show them without taking a sentence apart.

    BlockstepError
      OptionError          the user gave a bad value: names the option and says what would be right
      ImageError           what is in an image file is broken, or is not supported: names the field
      GraphError           the block graph refuses a change; nothing was changed
        NodeNotFound         no such node
        PermissionConflict   two users of a node exclude each other
        OperationBlocked     somebody has blocked this operation, and says why
      JobError             a job cannot do that in its state
        JobNotFound          no such job
      ReplicationError     a replication filter cannot do that; names the filter and the step
      ProtocolError        the peer broke the protocol: drop the connection
      PeerRefused          the peer said no in good order: do not ask the same again
      ConnectionLost       the peer is gone: asking again after a reconnect may succeed
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

#: How much of a bad value its error shows.
_LONGEST_SHOWN: Final = 200


class BlockstepError(Exception):
    """The root of all errors that blockstep raises, except I/O errors (`OSError`)."""


class OptionError(BlockstepError):
    """An option, argument or configuration value is wrong. Nothing was changed."""

    def __init__(self, option: str, value: object, expected: str) -> None:
        missing = (value is None or value is False) and expected.startswith("given")
        wrong = "" if missing else f": {_shown(value)} is not valid; it"
        super().__init__(f"{option}{wrong} should be {expected}".lstrip(": "))
        self.option, self.value, self.expected = option, value, expected

    def inside(self, where: str) -> OptionError:
        """The same error, where the options are the value of the option ``where``."""
        return OptionError(f"{where}.{self.option.rpartition(': ')[2]}", self.value, self.expected)


class ImageError(BlockstepError):
    """A field of an image file is wrong, or stands for something that is not supported. Nothing was written."""

    def __init__(self, field: str, value: object, expected: str, filename: str | None = None) -> None:
        where = "" if filename is None else f"{filename}: "
        super().__init__(f"{where}the image's {field} is {_shown(value)}; it should be {expected}")
        self.field, self.value, self.expected, self.filename = field, value, expected, filename

    def of(self, filename: str) -> ImageError:
        """The same error with the name of the image's file, if it has none yet."""
        return self if self.filename is not None else ImageError(self.field, self.value, self.expected, filename)


class GraphError(BlockstepError):
    """The block graph refuses a change. Nothing was changed."""


class NodeNotFound(GraphError):
    """No node has this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no node named '{name}'")
        self.name = name


class PermissionConflict(GraphError):
    """A user of a node needs what another user does not share."""

    def __init__(self, node: str, wanted_by: str, refused_by: str, permission: str) -> None:
        super().__init__(f"'{wanted_by}' needs permission '{permission}' on node '{node}', "
                         f"which '{refused_by}' does not share")
        self.node, self.wanted_by, self.refused_by, self.permission = node, wanted_by, refused_by, permission


class OperationBlocked(GraphError):
    """An operation on a node is blocked by somebody who gave a reason."""

    def __init__(self, node: str, operation: str, reason: str) -> None:
        super().__init__(f"'{operation}' on node '{node}' is not possible now: {reason}")
        self.node, self.operation, self.reason = node, operation, reason


class JobError(BlockstepError):
    """A job refuses a verb in its state, or there is no such job."""

    def __init__(self, job: str, reason: str) -> None:
        super().__init__(f"job '{job}': {reason}")
        self.job, self.reason = job, reason


class JobNotFound(JobError):
    """No job has this id."""

    def __init__(self, job: str) -> None:
        super().__init__(job, "there is no such job")


class ReplicationError(BlockstepError):
    """A replication filter refuses an operation or failed in it."""

    def __init__(self, filter: str, step: str, reason: str) -> None:
        super().__init__(f"replication filter '{filter}': {step}: {reason}")
        self.filter, self.step, self.reason = filter, step, reason


class ProtocolError(BlockstepError):
    """The peer broke the protocol. The connection cannot be used any more: drop it."""


class PeerRefused(BlockstepError):
    """The peer refused in good order. Asking the same again will not help."""


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}... ({len(shown)} characters)"


class ConnectionLost(OSError):
    """The connection to the peer is gone. An `OSError` (ENOTCONN unless given): a request fails like any I/O."""

    def __init__(self, reason: str, code: int = errno.ENOTCONN) -> None:
        super().__init__(code, explained(code, reason))
        self.reason = reason


@contextmanager
def noting(error: BaseException) -> Iterator[None]:
    """Clean up after ``error``, which is the one that is told: what goes wrong within becomes a note on it."""
    try:
        yield
    except Exception as second:
        error.add_note(f"and then: {told(second)}")


def told(error: BaseException) -> str:
    """The text of an error for people, without the number of an errno, and its notes."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return "; ".join([text, *getattr(error, "__notes__", ())])


def explained(code: int, reason: str = "") -> str:
    """The text of an `OSError`: the system's words for errno ``code``, then ``reason``, unless it begins with them.

    A reason that comes from a peer, or from a lower layer, often does.
    """
    words = os.strerror(code)
    if reason.startswith(words):
        return reason
    return f"{words}: {reason}" if reason else words


def of_socket(error: OSError, path: str) -> OSError:
    """An error of making a unix socket, with its path. Python's own check of the length has no errno."""
    code = error.errno or errno.ENAMETOOLONG
    return OSError(code, explained(code, "" if error.errno else "a socket's has 107 bytes at most"), path)
