"""``blockstep resize``: let a disk of a pair grow."""

from __future__ import annotations

from blockstep.cli.control import PairName, Qmp, execute, find_socket
from blockstep.cli.words import Argument
from blockstep.forms import Annotated
from blockstep.units import format_size, parse_size


def resize(
    disk: Annotated[str, Argument(metavar="DISK", help="The disk's name in the pair.")],
    size: Annotated[str, Argument(metavar="SIZE", help="Its new size; not less than it has.")],
    pair: PairName = None,
    qmp: Qmp = None,
) -> None:
    """Let a disk grow while it is in use: on the standby first, then here. Run it on the primary's host.

    A standby that is not there now grows when it comes back. Guests see the new size when they connect again.
    """
    length = parse_size(size, "SIZE")
    execute(find_socket(pair, None, qmp), "block_resize", {"node-name": disk, "size": length}, timeout=60.0)
    print(f"disk {disk} has {format_size(length)} now")
