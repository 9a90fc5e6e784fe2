"""The drivers: one file each, and one page of documentation each in ``docs/drivers``. ``ls`` is the feature list."""

from blockstep.drivers import null

__all__ = ["null"]
