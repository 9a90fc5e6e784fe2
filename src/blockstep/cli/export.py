"""``blockstep export``: serve one image over NBD."""

from __future__ import annotations

from pathlib import Path

from blockstep.cli.options import Listen, Socket, parse_served
from blockstep.cli.words import Argument, Option
from blockstep.errors import OptionError
from blockstep.forms import Annotated, Literal


def export(
    file: Annotated[Path, Argument(metavar="FILE", help="The image: a file or block device.")],
    format: Annotated[str, Option("-f", "--format", metavar="FMT", help="raw, qcow2 or overlay; auto: what its "
                                  "content looks like, which the disk's user can change if it is raw.")] = "raw",
    name: Annotated[str, Option("--name", help="The export's name.")] = "",
    socket: Socket = None,
    listen: Listen = None,
    read_only: Annotated[bool, Option("--read-only", "-r", help="Refuse writes.")] = False,
    cache: Annotated[Literal["writeback", "none"], Option(help="none: O_DIRECT, past the page cache.")]
        = "writeback",
    discard: Annotated[Literal["unmap", "ignore"], Option(help="What trim does to the file.")] = "unmap",
    tls: Annotated[Literal["off", "optional", "required"], Option(help="TLS for clients.")] = "off",
    tls_certificates: Annotated[Path | None, Option(metavar="DIR", help="Directory of ca-cert.pem, "
                                "server-cert.pem and server-key.pem.")] = None,
    tls_verify_peer: Annotated[bool, Option(help="Clients must have a certificate of the same CA.")] = False,
    max_connections: Annotated[int, Option(help="0: no limit.")] = 0,
) -> None:
    """Serve an image over NBD, until SIGTERM or SIGINT; then close it.

    Listens where --socket or --listen say, or on the sockets that systemd passes, or else on a socket
    in the runtime directory.
    """
    if max_connections < 0:
        raise OptionError("--max-connections", max_connections, "0 or more")
    from blockstep.aio.loop import run
    from blockstep.daemon.export import ExportConfig, main
    from blockstep.streams import announce

    config = ExportConfig(
        path=file, format=format, name=name, address=parse_served(socket, listen, "export.nbd"), read_only=read_only,
        direct=cache == "none", discard=discard, tls=tls, tls_certificates=tls_certificates,
        tls_verify_peer=tls_verify_peer, max_connections=max_connections, given=bool(socket or listen))
    run(main(config, lambda uris: announce(*uris)))
