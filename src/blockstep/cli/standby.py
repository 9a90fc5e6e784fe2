"""``blockstep standby``: keep the disks of a primary, and their view at the last checkpoint."""

from __future__ import annotations

from pathlib import Path

from blockstep.cli.options import (
    Disks,
    ExportTls,
    Listen,
    Pair,
    Qmp,
    Socket,
    Tls,
    parse_disks,
    parse_inet,
    parse_pair,
    parse_positive,
    parse_served,
)
from blockstep.cli.words import Option
from blockstep.errors import OptionError
from blockstep.forms import Annotated, Literal
from blockstep.places import STATE_SUFFIX, runtime_directory, state_directory
from blockstep.units import parse_size


def standby(
    disk: Disks,
    pair: Pair = "default",
    link: Annotated[str, Option("--link", metavar="HOST:PORT", help="Where the primary connects to; the port "
                    "above it is used as well.")] = "[::]:10809",
    socket: Socket = None,
    listen: Listen = None,
    buffer_memory: Annotated[str, Option(metavar="SIZE", help="What the buffers of one disk may hold in memory "
                             "between two checkpoints, each.")] = "1G",
    buffer_dir: Annotated[Path | None, Option(metavar="DIR", help="Where the buffers go beyond that. Without "
                          "it they are full then.")] = None,
    buffer_format: Annotated[Literal["overlay", "qcow2"], Option(help="What the buffers are. qcow2: files in the "
                             "directory from the first byte on, none of it in memory.")] = "overlay",
    qmp: Qmp = None,
    state: Annotated[Path | None, Option("--state", metavar="FILE", help="Where a promotion is written down, so "
                     "that a promoted standby never becomes one again by a restart. Beside it an end in good order is "
                     "written down (PAIR.ended), after which the checkpoint is there again; and whom the "
                     "disks follow (PAIR.follows), so that a crash costs only the difference.")] = None,
    tls: Tls = None,
    export_tls: ExportTls = None,
) -> None:
    """Keep a standby of a primary's disks.

    The disks' views (at the last checkpoint) are served where --socket or --listen say, or on the sockets
    that systemd passes, or else on a socket in the runtime directory; they may be read and written.
    """
    from blockstep.aio.loop import run
    from blockstep.daemon.standby import Standby, StandbyConfig, main
    from blockstep.streams import announce

    if buffer_format != "overlay" and buffer_dir is None:
        raise OptionError("--buffer-format", buffer_format, "overlay without --buffer-dir: images are files")
    config = StandbyConfig(
        pair=parse_pair(pair), disks=parse_disks(disk), link=parse_inet(link, "--link"),
        view=parse_served(socket, listen, f"{pair}.standby.nbd"),
        qmp=(qmp or runtime_directory() / f"{pair}.standby.qmp").absolute(),
        state=(state or state_directory() / f"{pair}{STATE_SUFFIX}").absolute(),
        buffer_memory=parse_positive(buffer_memory, "--buffer-memory", parse_size), buffer_dir=buffer_dir,
        buffer_format=buffer_format, tls=tls,
        view_tls=export_tls, view_given=socket is not None or listen is not None)

    def ready(program: Standby) -> None:
        link = program.status().link
        announce(f"standby of pair '{pair}': waiting for its primary at {link}, control {config.qmp}",
                 *program.exports)

    run(main(config, ready))
