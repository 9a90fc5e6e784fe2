"""Objects come and go: secrets, TLS credentials, throttle groups.

Source: QEMU's QMP reference, "QEMU Object Model (QOM)", for names and arguments.
"""

from __future__ import annotations

from typing import Annotated, Any, Union

from msgspec import Meta

from blockstep.inventory.objects import TYPES
from blockstep.qmp.commands.holder import Holder
from blockstep.qmp.schema import Arguments, Registry

commands = Registry()

#: The properties of an object of any type, told apart by ``qom-type``.
ObjectArguments: Any = Union[tuple(TYPES.values())]  # noqa: UP007  built from the table


class ObjectDelArguments(Arguments):
    """Arguments of object-del."""

    id: Annotated[str, Meta(description="The object.")]


@commands.command("object-add")
async def object_add(context: Holder, args: ObjectArguments) -> None:
    """Make an object of the type ``qom-type``, for others to refer to by its id."""
    context.inventory.objects.add(args)


@commands.command("object-del")
async def object_del(context: Holder, args: ObjectDelArguments) -> None:
    """Take an object away. A throttle group must not be in use; who has got hold of credentials keeps them."""
    context.inventory.objects.remove(args.id)
