"""The drivers: one file each, and one page of documentation each in ``docs/drivers``. ``ls`` is the feature list."""

from blockstep.drivers import copy_before_write, file, null, quorum, replication

__all__ = ["copy_before_write", "file", "null", "quorum", "replication"]
