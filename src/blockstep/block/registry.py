"""Which drivers there are, and how options become the options of one of them.

A driver registers itself when its module is imported; `blockstep.drivers` imports all that come with the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import Any, TypeVar

import msgspec

from blockstep.block.driver import Driver
from blockstep.block.node import NodeOptions
from blockstep.errors import OptionError

D = TypeVar("D", bound=type[Driver])

_drivers: dict[str, type[Driver]] = {}


def register(driver: D) -> D:
    """Class decorator: make a driver known by its ``driver`` name."""
    _drivers[driver.driver] = driver
    return driver


def driver_names() -> list[str]:
    """The names of all drivers, sorted."""
    return sorted(_drivers)


def options_type() -> Any:
    """The options of any driver: a union of structs, told apart by ``driver``."""
    return reduce(or_, (_drivers[name].Options for name in driver_names()))


def find_driver(name: object) -> type[Driver]:
    """The driver of that name. Raises OptionError listing those that exist."""
    if not isinstance(name, str) or name not in _drivers:
        raise OptionError("driver", name, "one of " + ", ".join(driver_names()))
    return _drivers[name]


def parse_options(options: Mapping[str, Any] | NodeOptions, strict: bool = True) -> tuple[type[Driver], NodeOptions]:
    """Check ``options`` against their driver. ``strict=False`` takes "1" for 1 (options from a command line).

    Raises OptionError that names the option and says what is wrong with it.
    """
    if isinstance(options, NodeOptions):
        return find_driver(type(options).__struct_config__.tag), options
    if "driver" not in options:
        raise OptionError("driver", None, "given: one of " + ", ".join(driver_names()))
    driver = find_driver(options["driver"])
    try:
        return driver, msgspec.convert(dict(options), driver.Options, strict=strict)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        name = where.strip("`.") or "options"
        expected = f"as its driver takes it: {what}"
        raise OptionError(f"{driver.driver}: {name}", _value_at(options, name), expected) from None


def _value_at(options: Mapping[str, Any], path: str) -> Any:
    value: Any = options
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return dict(options)
        value = value[part]
    return value
