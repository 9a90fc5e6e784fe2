"""What users of a node may do beside each other."""

from __future__ import annotations

import itertools

import pytest

from blockstep.block.permissions import (
    ALL,
    NONE,
    READ,
    WRITE,
    WRITE_UNCHANGED,
    Permission,
    Role,
    default_child_permissions,
)

EVERY = [Permission(bits) for bits in range(ALL + 1)]


def test_permissions_are_named_as_users_know_them() -> None:
    assert str(READ | WRITE) == "consistent-read, write"
    assert str(WRITE_UNCHANGED) == "write-unchanged"
    assert str(NONE) == ""


@pytest.mark.parametrize("role", [Role.FILTERED, Role.DATA])
def test_what_is_shown_as_it_is_passes_permissions_as_they_are(role: Role) -> None:
    for taken, shared in itertools.product(EVERY, EVERY):
        assert default_child_permissions(role, taken, shared, read_only=False) == (taken, shared)


def test_a_backing_node_is_read_only_and_its_writers_depend_on_those_above() -> None:
    for taken, shared in itertools.product(EVERY, EVERY):
        below, others = default_child_permissions(Role.BACKING, taken, shared, read_only=False)
        assert below == (READ if taken & (READ | WRITE) else NONE)
        assert bool(others & WRITE) == bool(shared & WRITE)
        assert others & READ


@pytest.mark.parametrize("read_only", [False, True])
def test_the_file_of_a_format_has_no_second_writer(read_only: bool) -> None:
    for taken, shared in itertools.product(EVERY, EVERY):
        below, others = default_child_permissions(Role.STORAGE, taken, shared, read_only)
        assert below & READ
        assert bool(below & WRITE) is not read_only
        assert not others & WRITE or (read_only and shared & WRITE)


def test_a_target_is_written_and_not_by_others() -> None:
    below, others = default_child_permissions(Role.TARGET, NONE, ALL, read_only=False)
    assert below & WRITE
    assert not others & WRITE
