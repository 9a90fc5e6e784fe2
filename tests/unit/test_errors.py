"""Errors carry their facts as fields and tell what to do next by their class."""

from __future__ import annotations

import errno
import inspect

import pytest

from blockstep import errors
from blockstep.errors import (
    BlockstepError,
    ConnectionLost,
    GraphError,
    JobError,
    NodeNotFound,
    OperationBlocked,
    OptionError,
    PermissionConflict,
    ReplicationError,
    explained,
    told,
)


def test_all_have_one_root_but_the_lost_connection_which_is_an_io_error() -> None:
    classes = [thing for _, thing in inspect.getmembers(errors, inspect.isclass)
               if issubclass(thing, Exception)]
    assert [thing for thing in classes if not issubclass(thing, BlockstepError)] == [ConnectionLost]
    assert issubclass(ConnectionLost, OSError)


def test_every_class_is_in_the_tree_at_the_top_of_the_module() -> None:
    for name, thing in inspect.getmembers(errors, inspect.isclass):
        if issubclass(thing, Exception):
            assert name in (errors.__doc__ or "")


def test_an_option_error_names_the_option_and_what_would_be_right() -> None:
    error = OptionError("mode", "third", "primary or secondary")
    assert (error.option, error.value, error.expected) == ("mode", "third", "primary or secondary")
    assert str(error) == "mode: 'third' is not valid; it should be primary or secondary"


@pytest.mark.parametrize("value", [None, False])
def test_an_option_that_is_missing_is_not_called_invalid(value: object) -> None:
    assert str(OptionError("-f", value, "given: a format")) == "-f should be given: a format"
    assert str(OptionError("-f", value, "raw")) == f"-f: {value} is not valid; it should be raw"


@pytest.mark.parametrize(("error", "text"), [
    (FileNotFoundError(2, "No such file or directory", "/a"), "/a: No such file or directory"),
    (OSError(28, "No space left on device: the disk"), "No space left on device: the disk"),
    (TimeoutError(), "TimeoutError"),
    (ValueError("[Errno 5] of somebody else"), "[Errno 5] of somebody else"),
])
def test_an_error_is_told_without_numbers_and_with_its_notes(error: Exception, text: str) -> None:
    assert told(error) == text
    error.add_note("and so on")
    assert told(error) == f"{text}; and so on"


def test_graph_errors_can_be_caught_together() -> None:
    for error in (NodeNotFound("disk0"), PermissionConflict("disk0", "export", "backup", "write"),
                  OperationBlocked("disk0", "resize", "replication runs")):
        assert isinstance(error, GraphError)
        assert "disk0" in str(error)


def test_a_permission_conflict_names_both_sides() -> None:
    error = PermissionConflict("disk0", wanted_by="export", refused_by="backup", permission="write")
    assert all(word in str(error) for word in ("disk0", "export", "backup", "write"))


def test_a_job_and_a_filter_are_named() -> None:
    assert str(JobError("copy0", "is concluded")) == "job 'copy0': is concluded"
    error = ReplicationError("r0", "checkpoint", "no room")
    assert str(error) == "replication filter 'r0': checkpoint: no room"


def test_a_lost_connection_has_an_errno_like_any_io_error() -> None:
    assert ConnectionLost("the peer closed").errno == errno.ENOTCONN
    lost = ConnectionLost("no answer in 5 s", errno.ETIMEDOUT)
    assert lost.errno == errno.ETIMEDOUT
    assert lost.reason in str(lost)


@pytest.mark.parametrize(("reason", "text"), [
    ("", "No space left on device"),
    ("the buffer is full", "No space left on device: the buffer is full"),
    ("No space left on device", "No space left on device"),
    ("No space left on device: the buffer is full", "No space left on device: the buffer is full"),
])
def test_an_errno_is_put_into_words_once(reason: str, text: str) -> None:
    assert explained(errno.ENOSPC, reason) == text
    assert ConnectionLost(reason, errno.ENOSPC).strerror == text
