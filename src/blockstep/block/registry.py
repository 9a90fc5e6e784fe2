"""Which drivers there are, and how options become the options of one of them.

A driver registers itself when its module is imported. For those that come with the package, and whose names
`blockstep.drivers` has made known, that is when they are first asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from importlib import import_module
from operator import or_
from typing import Any, Final, TypeVar

from blockstep import keyval
from blockstep.block.driver import Driver
from blockstep.block.driver_modules import MODULES
from blockstep.block.node import NodeOptions
from blockstep.errors import OptionError

D = TypeVar("D", bound=type[Driver])

_drivers: dict[str, type[Driver]] = {}

#: Drivers that people who come from QEMU ask for -> what there is for them.
_INSTEAD: Final = {
    "host_cdrom": "a drive is a block device, opened by 'host_device' with read-only",
    "snapshot-access": "a backup job with sync=none exposes a snapshot through its target",
    "copy-on-read": "a mirror job copies all of a disk while it is used",
    "blklogwrites": "'blklog' logs writes",
    "blkverify": "'quorum' with blkverify compares two children",
}


def register(driver: D) -> D:
    """Class decorator: make a driver known by its ``driver`` name."""
    _drivers[driver.driver] = driver
    return driver


def driver_names() -> list[str]:
    """The names of all drivers, sorted."""
    return sorted({*_drivers, *MODULES})


def options_type() -> Any:
    """The options of any driver: a union of structs, told apart by ``driver``."""
    return reduce(or_, (find_driver(name).Options for name in driver_names()))


def find_driver(name: object) -> type[Driver]:
    """The driver of that name. Raises OptionError listing those that exist."""
    if not isinstance(name, str):
        raise OptionError("driver", name, "the name of one: " + ", ".join(driver_names()))
    if name in _INSTEAD:
        raise OptionError("driver", name, f"one that is here: {_INSTEAD[name]}")
    if name not in _drivers and name in MODULES:
        import_module(MODULES[name])
    if name not in _drivers:
        raise OptionError("driver", name, "one of " + ", ".join(driver_names()))
    return _drivers[name]


def parse_options(options: Mapping[str, Any] | NodeOptions, strict: bool = True) -> tuple[type[Driver], NodeOptions]:
    """Check ``options`` against their driver.

    ``strict=False``: they are words of a command line, where "1" stands for 1, "64k" for 65536 and "on" for true.

    Raises OptionError that names the option and says what is wrong with it.
    """
    if isinstance(options, NodeOptions):
        return find_driver(type(options).__struct_config__.tag), options
    if "driver" not in options:
        raise OptionError("driver", None, "given: one of " + ", ".join(driver_names()))
    driver = find_driver(options["driver"])
    return driver, keyval.fit(dict(options), driver.Options, driver.driver, words=not strict)
