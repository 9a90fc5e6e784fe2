"""The NBD server and what it exports: ``nbd-server-*`` and ``block-export-*``.

The two families are one table: ``nbd-server-add`` and ``-remove`` are older forms of ``block-export-add`` and ``-del``.
What differs: they take a device or a node, and give its name to the export unless told otherwise; that name is the
id as well; and on a read-only node ``writable`` is no error, the export is read-only.

Source: QEMU's QMP reference, "Block device exports".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from blockstep.inventory import exports as table
from blockstep.inventory.exports import BlockExport, ExportOptions
from blockstep.qmp.commands.holder import Holder
from blockstep.qmp.schema import Arguments, Event, Registry, Result

commands = Registry()

Mode = Annotated[Literal["safe", "hard"], Meta(
    description="safe: refuse if there are clients. hard: cut them off.")]


class _Wrapped(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, kw_only=True, tag_field="type"):
    """Base of addresses, as this command has them: the type, and the rest in ``data``."""


class InetData(Arguments):
    """Where a TCP server listens."""

    host: Annotated[str, Meta(description="A name or an address; empty: all of this machine.")]
    port: Annotated[str, Meta(description="A number; 0: one that is free.")]


class UnixData(Arguments):
    """A unix socket."""

    path: Annotated[str, Meta(description="Where it is in the file system.")]


class FdData(Arguments):
    """A listening socket that this process was started with."""

    text: Annotated[str, Meta(description="The number of its file descriptor.")] = msgspec.field(name="str")


class InetWrapped(_Wrapped, tag="inet"):
    """TCP."""

    data: InetData


class UnixWrapped(_Wrapped, tag="unix"):
    """A unix socket."""

    data: UnixData


class FdWrapped(_Wrapped, tag="fd"):
    """A socket that was handed over."""

    data: FdData


class StartArguments(Arguments):
    """Arguments of nbd-server-start."""

    addr: Annotated[InetWrapped | UnixWrapped | FdWrapped, Meta(description="Where to listen.")]
    tls_creds: Annotated[str | None, Meta(
        description="Id of a tls-creds-x509 object with endpoint=server. All clients must speak TLS then.")] = None
    tls_authz: Annotated[str | None, Meta(description="Refused: there are no authorization objects.")] = None
    max_connections: Annotated[int, Meta(ge=0, le=0xFFFFFFFF, description="Clients at a time; 0: no limit.")] = 0


class AddArguments(Arguments):
    """Arguments of nbd-server-add."""

    device: Annotated[str, Meta(description="Name of a device or node.")]
    name: Annotated[str | None, Meta(description="Name and id of the export. By default that of the device.")] = None
    description: Annotated[str, Meta(description="For people, in what the server lists; 4096 bytes at most.")] = ""
    writable: Annotated[bool, Meta(description="Clients may write, if the node can be written to.")] = False
    bitmap: Annotated[str | None, Meta(description="A dirty bitmap to show as qemu:dirty-bitmap:NAME.")] = None


class RemoveArguments(Arguments):
    """Arguments of nbd-server-remove."""

    name: Annotated[str, Meta(description="Id of the export.")]
    mode: Mode = "safe"


class DeleteArguments(Arguments):
    """Arguments of block-export-del."""

    id: Annotated[str, Meta(description="Id of the export.")]
    mode: Mode = "safe"


class ExportInfo(Result):
    """One export, in the result of query-block-exports."""

    id: str
    type: Literal["nbd"]
    node_name: str
    #: It was removed, and what its clients had started has not ended yet.
    shutting_down: bool


@commands.event("BLOCK_EXPORT_DELETED")
class BlockExportDeleted(Event):
    """An export is gone: nothing of it is in flight any more, and its id is free."""

    id: str


@commands.command("nbd-server-start")
async def nbd_server_start(context: Holder, args: StartArguments) -> None:
    """Start the NBD server. There is one; it is refused if it runs already. At return clients can connect."""
    data: Any = args.addr.data
    address: table.SocketAddress
    if isinstance(args.addr, InetWrapped):
        address = table.InetSocket(host=data.host, port=data.port)
    elif isinstance(args.addr, UnixWrapped):
        address = table.UnixSocket(path=data.path)
    else:
        address = table.FdSocket(text=data.text)
    await context.inventory.exports.start_server(
        [address], tls_creds=args.tls_creds, tls_authz=args.tls_authz, max_connections=args.max_connections)


@commands.command("nbd-server-stop")
async def nbd_server_stop(context: Holder, args: Arguments) -> None:
    """Stop the NBD server and remove all exports.

    What clients have sent is answered, for a second at most; then they are cut off.
    """
    await context.inventory.exports.stop_server()


@commands.command("nbd-server-add", features=["deprecated"])
async def nbd_server_add(context: Holder, args: AddArguments) -> None:
    """Export a device or a node; the older form of block-export-add."""
    inventory = context.inventory
    name = args.device if args.name is None else args.name
    node = inventory.graph.nodes.get(args.device)
    await inventory.exports.add(ExportOptions(
        type="nbd", id=name, node_name=args.device, name=name, description=args.description,
        writable=args.writable and not (node is not None and node.read_only),
        bitmaps=[] if args.bitmap is None else [args.bitmap]))


@commands.command("nbd-server-remove", features=["deprecated"])
async def nbd_server_remove(context: Holder, args: RemoveArguments) -> None:
    """Remove an export; the older form of block-export-del."""
    await context.inventory.exports.remove(args.name, args.mode)


@commands.command("block-export-add")
async def block_export_add(context: Holder, args: ExportOptions) -> None:
    """Export a node over NBD. The NBD server must run."""
    await context.inventory.exports.add(args)


@commands.command("block-export-del")
async def block_export_del(context: Holder, args: DeleteArguments) -> None:
    """Remove an export. At return no client can reach it; when it is gone, BLOCK_EXPORT_DELETED says so."""
    await context.inventory.exports.remove(args.id, args.mode)


@commands.command("query-block-exports")
async def query_block_exports(context: Holder, args: Arguments) -> list[ExportInfo]:
    """All exports, the newest first; those that are shutting down too."""
    return [_info(export) for export in reversed([*context.inventory.exports])]


def _info(export: BlockExport) -> ExportInfo:
    return ExportInfo(id=export.id, type=export.options.type, node_name=export.node.name,
                      shutting_down=export.shutting_down)
