"""How the commands reach a running primary or standby: the control socket, by pair and role, or by path."""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from blockstep.cli.signals import run_unless_told
from blockstep.cli.words import Argument, Option
from blockstep.errors import BlockstepError, OptionError
from blockstep.forms import Annotated
from blockstep.places import QMP_SUFFIX, runtime_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, TypeVar

    from blockstep.qmp.client import Connection

    T = TypeVar("T")


_ROLES: Final = ("primary", "standby")

PairName = Annotated[str | None, Argument(metavar="[PAIR]", help="The pair's name; needed if several run here.")]
Qmp = Annotated[Path | None, Option("--qmp", metavar="PATH", help="The control socket, if it is not where "
                                          "the program puts it by itself.")]
Json = Annotated[bool, Option("--json", help="The answer as JSON, for programs.")]


def find_sockets(pair: str | None, role: str | None, qmp: Path | None) -> list[Path]:
    """The control sockets that are meant; of dead programs only if there are no others. Raises BlockstepError if
    there is none."""
    if qmp:
        return [qmp]
    directory = runtime_directory()
    found = sorted(path for path in directory.glob(f"*{QMP_SUFFIX}") if _is_of(path, pair, role))
    if not found:
        what = f"pair '{pair}'" if pair else "pair"
        raise BlockstepError(f"no {role or 'program'} of a {what} has its control socket in {directory}; "
                             "is it running? If that is elsewhere, --qmp says where")
    return [path for path in found if not _is_left_behind(path)] or found


def _is_of(path: Path, pair: str | None, role: str | None) -> bool:
    """Whether it is the control socket of that pair and role. A pair's name may have dots, and is no pattern."""
    name, _, which = path.name.removesuffix(QMP_SUFFIX).rpartition(".")
    return name != "" and pair in (None, name) and which in ((role,) if role else _ROLES)


def _is_left_behind(path: Path) -> bool:
    """Whether this is the socket of a program that was killed."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            return probe.connect_ex(str(path)) == errno.ECONNREFUSED
        except OSError:  # a path that no socket can have
            return False


def find_socket(pair: str | None, role: str | None, qmp: Path | None) -> Path:
    """The one control socket that is meant. Raises BlockstepError if there is none, or more than one."""
    found = find_sockets(pair, role, qmp)
    if len(found) > 1:
        names = ", ".join(path.name.removesuffix(QMP_SUFFIX) for path in found)
        raise OptionError("--qmp" if pair else "PAIR", None, f"given: several run here ({names})")
    return found[0]


def ask(path: Path, talk: Callable[[Connection], Awaitable[T]], timeout: float = 10.0) -> T:
    """Connect to a control socket and run ``talk``. Raises ConnectionLost, CommandRefused, TimeoutError."""
    from blockstep.qmp.client import connect  # takes as long as all the rest, and the help does without

    async def run() -> T:
        async with connect(path, timeout=timeout) as qmp:
            return await talk(qmp)

    return run_unless_told(run())


def execute(path: Path, command: str, arguments: dict[str, Any] | None = None, timeout: float = 10.0) -> Any:
    """One command. Raises as `ask`."""
    return ask(path, lambda qmp: qmp.execute(command, arguments), timeout)
