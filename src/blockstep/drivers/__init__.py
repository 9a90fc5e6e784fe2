"""The drivers: one file each, and one page of documentation each in ``docs/drivers``. ``ls`` is the feature list.

To import this package makes them known; the module of a driver is imported when it is first used, or by `load`.
"""

from __future__ import annotations

from blockstep.block.driver_modules import MODULES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_MODULES: Final = {
    "blkdebug": "blkdebug",
    "blklog": "blklog",
    "copy-before-write": "copy_before_write",
    "file": "file",
    "host_device": "file",
    "memory": "memory",
    "nbd": "nbd",
    "null": "null",
    "null-aio": "null",
    "null-co": "null",
    "overlay": "overlay",
    "qcow2": "qcow2.driver",
    "quorum": "quorum",
    "raw": "raw",
    "replication": "replication",
    "throttle": "throttle",
}

MODULES.update({name: f"{__name__}.{module}" for name, module in _MODULES.items()})


def load() -> None:
    """Import all of them now: a server does that before it serves, not in the middle of somebody's request."""
    from importlib import import_module

    for module in MODULES.values():
        import_module(module)
