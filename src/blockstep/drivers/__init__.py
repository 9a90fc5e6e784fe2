"""The drivers: one file each, and one page of documentation each in ``docs/drivers``. ``ls`` is the feature list."""

from blockstep.drivers import (
    blkdebug,
    blklog,
    copy_before_write,
    file,
    memory,
    nbd,
    null,
    overlay,
    qcow2,
    quorum,
    raw,
    replication,
    throttle,
)

__all__ = [
    "blkdebug",
    "blklog",
    "copy_before_write",
    "file",
    "memory",
    "nbd",
    "null",
    "overlay",
    "qcow2",
    "quorum",
    "raw",
    "replication",
    "throttle",
]
