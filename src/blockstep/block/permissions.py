"""What the users of a node may do with it, and what they let others do.

Each edge of the graph carries two sets: what it *takes* and what it *shares* with all other edges to the same
node. Two edges conflict when one takes what the other does not share. A driver derives what it takes from its
children from what its own parents take from it: see `Driver.child_permissions`.
"""

from __future__ import annotations

import enum
from typing import Final


class Permission(enum.IntFlag):
    """The rights on a node's data."""

    CONSISTENT_READ = 1  #: reads that make sense: the content is that of one disk at one time
    WRITE = 2  #: writes that change what the node reads as
    WRITE_UNCHANGED = 4  #: writes that do not (copying a backing file's data up, say)
    RESIZE = 8  #: change the length

    def __str__(self) -> str:
        return ", ".join(flag.name.lower().replace("_", "-") for flag in type(self) if flag in self and flag.name)


READ: Final = Permission.CONSISTENT_READ
WRITE: Final = Permission.WRITE
WRITE_UNCHANGED: Final = Permission.WRITE_UNCHANGED
RESIZE: Final = Permission.RESIZE
NONE: Final = Permission(0)
ALL: Final = READ | WRITE | WRITE_UNCHANGED | RESIZE

#: What a filter passes through from its parents to its child, as it is.
DATA: Final = READ | WRITE | WRITE_UNCHANGED


class Role(enum.Enum):
    """What a child is to its parent; decides the permissions that the parent takes by default."""

    FILTERED = "filtered"  #: the parent shows the child's data as it is
    DATA = "data"  #: one of several that hold the parent's data (quorum)
    STORAGE = "storage"  #: the parent's data and metadata lie in it (an image format's file)
    BACKING = "backing"  #: shows through where the parent holds nothing
    TARGET = "target"  #: the parent copies something into it


def default_child_permissions(
    role: Role, taken: Permission, shared: Permission, read_only: bool
) -> tuple[Permission, Permission]:
    """What a node takes and shares on a child in ``role``, given what its parents together take and share."""
    if role in (Role.FILTERED, Role.DATA):
        return taken, shared | (ALL & ~(DATA | RESIZE))
    if role is Role.BACKING:
        # A writer below changes what the overlay reads as; only parents who share WRITE put up with that.
        return READ if taken & (READ | WRITE) else NONE, ALL if shared & WRITE else READ | WRITE_UNCHANGED
    if role is Role.STORAGE:
        take = READ if read_only else READ | WRITE | RESIZE
        return take, READ | WRITE_UNCHANGED | (shared & (WRITE | RESIZE) if read_only else NONE)
    return READ | WRITE | WRITE_UNCHANGED, READ | WRITE_UNCHANGED
