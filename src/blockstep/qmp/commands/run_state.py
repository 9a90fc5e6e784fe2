"""Hold the guests back and let them go on: ``stop`` and ``cont``.

In QEMU these stop and continue the guest's processors, and with them the writes to its disks. A storage daemon has no
guest; but its clients have, and what a manager wants of ``stop`` is that the disks stay as they are: to cancel a mirror
and attach a standby with nothing written in between, or to copy a file. So ``stop`` holds back the requests of guests;
they wait, and nothing fails.

A guest's request is one that comes through an export of a node at the top of its graph. An export of a node inside one
is for a peer (the secondary disk that a primary writes to, a mirror's target): those go on, as NBD exports of a stopped
QEMU do.

Source: QEMU's QMP reference, "VM run state control".
"""

from __future__ import annotations

from typing import Protocol

from blockstep.inventory.inventory import Inventory
from blockstep.qmp.schema import Arguments, Event, Registry

commands = Registry()


class Runner(Protocol):
    """What these commands need of their context."""

    run_state: str

    @property
    def inventory(self) -> Inventory: ...


@commands.event("STOP")
class Stop(Event):
    """The guests are held back."""


@commands.event("RESUME")
class Resume(Event):
    """The guests go on."""


@commands.command("stop")
async def stop(context: Runner, args: Arguments) -> None:
    """Hold back the requests of guests; see the module.

    At return those that were in flight have ended, and their disks are flushed. A second one does nothing. An error of
    a flush is told, and the guests are held back all the same.
    """
    if context.run_state != "running":
        return
    context.run_state = "paused"
    context.inventory.report("STOP", {})
    await context.inventory.exports.hold_guests()


@commands.command("cont")
async def cont(context: Runner, args: Arguments) -> None:
    """Let the requests of guests go on. A second one does nothing."""
    if context.run_state != "paused":
        return
    context.run_state = "running"
    context.inventory.exports.release_guests()
    context.inventory.report("RESUME", {})
