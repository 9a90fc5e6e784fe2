"""``blockstep primary``: serve a guest's disks and keep a standby of them."""

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
from blockstep.places import ENDED_SUFFIX, runtime_directory, state_directory
from blockstep.units import parse_duration, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

#: Seconds: requests are looked at several times in that time.
_LEAST_STALL: Final = 0.01


def primary(
    disk: Disks,
    standby: Annotated[str, Option("--standby", metavar="HOST[:PORT]", help="The standby's --link address.")],
    pair: Pair = "default",
    socket: Socket = None,
    listen: Listen = None,
    checkpoint_every: Annotated[str, Option(metavar="TIME", help="A checkpoint is due after this time; "
                                "0: not by time.")] = "5s",
    checkpoint_bytes: Annotated[str, Option(metavar="SIZE", help="A checkpoint is due after so much was "
                                "written; 0: not by size.")] = "256M",
    ack: Annotated[Literal["local", "both"], Option(help="Who has a write when the guest is told.")] = "local",
    queue: Annotated[str, Option(metavar="SIZE", help="What may wait for the standby, for each disk, with "
                     "--ack local.")] = "64M",
    max_stall: Annotated[str, Option(metavar="TIME", help="The longest that a sick standby can hold up the "
                         "guest; then the pair lets go of it.")] = "2s",
    qmp: Qmp = None,
    state: Annotated[Path | None, Option("--state", metavar="FILE", help="Where an end in good order is written "
                     "down, so that after a restart only the difference is copied.")] = None,
    tls: Tls = None,
    export_tls: ExportTls = None,
) -> None:
    """Serve disks to a guest, forward their writes to a standby, and take checkpoints.

    The disks are served where --socket or --listen say, or on the sockets that systemd passes, or else on a
    socket in the runtime directory.
    """
    from blockstep.aio.loop import run
    from blockstep.daemon.primary import Primary, PrimaryConfig, main
    from blockstep.streams import announce

    stall = parse_duration(max_stall, "--max-stall")
    if stall < _LEAST_STALL:
        raise OptionError("--max-stall", max_stall, "10ms or more")
    config = PrimaryConfig(
        pair=parse_pair(pair), disks=parse_disks(disk), standby=parse_inet(standby, "--standby"),
        export=parse_served(socket, listen, f"{pair}.primary.nbd"),
        qmp=(qmp or runtime_directory() / f"{pair}.primary.qmp").absolute(),
        state=(state or state_directory() / f"{pair}{ENDED_SUFFIX}").absolute(), ack=ack,
        queue=parse_positive(queue, "--queue", parse_size),
        max_stall=stall,
        checkpoint_every=parse_duration(checkpoint_every, "--checkpoint-every"),
        checkpoint_bytes=parse_size(checkpoint_bytes, "--checkpoint-bytes"), tls=tls,
        export_tls=export_tls, export_given=socket is not None or listen is not None)

    def ready(program: Primary) -> None:
        announce(f"primary of pair '{pair}': standby at {config.standby}, control {config.qmp}",
                 *program.status().exports)

    run(main(config, ready))
