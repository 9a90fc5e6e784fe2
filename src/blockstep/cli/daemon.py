"""``blockstep daemon``: nodes, NBD exports and QMP monitors, with the command line of qemu-storage-daemon."""

from __future__ import annotations

from blockstep.cli.words import Argument
from blockstep.forms import Annotated


def daemon(
    options: Annotated[list[str] | None, Argument(
        metavar="[OPTION VALUE]...", help="Those of qemu-storage-daemon; `blockstep daemon --help` says which, with "
        "the options of every driver")] = None,
) -> int:
    """Open disks, export them and be told what to do over QMP, as qemu-storage-daemon does.

    Options are carried out in the order in which they are given: --object, --blockdev, --nbd-server, --export,
    --chardev and --monitor, or --qmp for both. Of the process as a whole are --daemonize, --pidfile, --name, --help
    and --version. Exit codes: 0, and 1 for every error. See docs/daemon.md.
    """
    from blockstep.cli.daemon_line import main

    return main(options or [])
