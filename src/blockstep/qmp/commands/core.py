"""What every program with a QMP socket answers: what it is, what it can do, how it is, and quit.

Source: QEMU's QMP reference, "QMP monitor control" and "VM run state control" for the names and results.
"""

from __future__ import annotations

from typing import Literal, Protocol

from msgspec import UNSET, UnsetType

from blockstep.qmp.schema import Arguments, Event, Monitor, Registry, Result
from blockstep.qmp.session import NEGOTIATE

commands = Registry()

#: QEMU's words for whether a guest runs, those of them that are true of a program without a guest.
RunState = Literal["prelaunch", "running", "paused", "shutdown"]


class Triple(Result):
    """A version number."""

    major: int
    minor: int
    micro: int


class Version(Result):
    """Result of query-version, and the version of the greeting.

    ``qemu`` is there because QEMU's clients look for it: the version of QEMU whose commands we follow.
    """

    qemu: Triple
    package: str


class Name(Result):
    """Result of query-name."""

    name: str | UnsetType = UNSET


class Status(Result):
    """Result of query-status."""

    #: Whether ``status`` is ``running``.
    running: bool
    #: Never: there is no processor.
    singlestep: bool
    status: RunState


class CommandName(Result):
    """One command, in the result of query-commands."""

    name: str


class Core(Protocol):
    """What these commands need of their context: the program."""

    @property
    def version(self) -> Version:
        """Of the program."""

    @property
    def name(self) -> str | None:
        """Of this process, if the user gave it one."""

    @property
    def run_state(self) -> RunState:
        """Whether the guest's disks are served."""

    def request_quit(self) -> None:
        """Begin a clean stop, and return at once, so that the answer goes out first."""


@commands.event("SHUTDOWN")
class Shutdown(Event):
    """The program stops."""

    #: Whether the guest wanted it: never.
    guest: bool = False
    reason: Literal["host-qmp-quit", "host-signal", "host-error"] = "host-qmp-quit"


@commands.command("query-version")
async def query_version(context: Core, args: Arguments) -> Version:
    """The version of the program."""
    return context.version


@commands.command("query-name")
async def query_name(context: Core, args: Arguments) -> Name:
    """The name that this process was given, if any."""
    return Name(name=context.name or UNSET)


@commands.command("query-status")
async def query_status(context: Core, args: Arguments) -> Status:
    """Whether the disks are served."""
    return Status(running=context.run_state == "running", singlestep=False, status=context.run_state)


@commands.command("query-commands")
async def query_commands(context: Core, args: Arguments, monitor: Monitor) -> list[CommandName]:
    """The commands that this monitor may execute."""
    return [CommandName(name=name) for name in sorted([*monitor.commands, NEGOTIATE])]


@commands.command("quit")
async def quit_(context: Core, args: Arguments) -> None:
    """Stop the program: jobs are cancelled, exports drained, nodes flushed. The answer comes before that."""
    context.request_quit()
