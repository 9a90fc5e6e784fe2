"""What one process exports over NBD: one server, started once, and block exports that come and go by their ids.

    table = ExportTable(graph, report, credentials)
    await table.start_server([UnixSocket(path="/run/disks.sock")])
    await table.add(ExportOptions(type="nbd", id="disk", node_name="node", writable=True))
    await table.remove("disk", "hard")         # BLOCK_EXPORT_DELETED is reported when it is really gone
    await table.stop_server()                  # takes all exports with it

The life of an export:

    add ──► served ──► shutting down ──► gone
                │            │             └── it let go of its node; its id is free again; BLOCK_EXPORT_DELETED
                │            └── no client can reach it; what had been started in the disk is being ended
                └── remove (safe: only without clients; hard), or the server is stopped

An export is a user of its node: while it lives the node cannot be deleted. It uses whatever node a change of the graph
puts there (the end of a mirror, a filter), and its clients notice nothing. A node that belongs to nobody else (a target
that a mirror opened) is flushed and closed with it; if that fails, the export is gone all the same. When the right to
write is taken away from it (`Backend.revoke`: a standby was promoted) its clients are cut off, and those that come back
find it read-only.

A bitmap that is exported is busy: nobody removes or clears it meanwhile.

*Guests* can be held back, all together: their requests wait until they are released. A guest's export is one of a node
at the top of its graph; a node with others above it is exported to a peer (the secondary disk that a primary writes
to, the target of a mirror), and goes on.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import stat
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from blockstep.aio.names import parse_port
from blockstep.block.bitmap import DirtyBitmap
from blockstep.block.driver import FUA, Buffer, Driver
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.names import check_name
from blockstep.block.node import Node
from blockstep.block.permissions import READ, WRITE
from blockstep.errors import BlockstepError, OptionError, noting, told
from blockstep.inventory.nodes import tried
from blockstep.nbd.export import Export, ExportInUse
from blockstep.nbd.server import Server
from blockstep.nbd.uri import Address, InetAddress, NbdUri, UnixAddress

#: Seconds that clients get to take the answers to what they have sent, when the server is stopped by a command.
STOP_DEADLINE: Final = 1.0
#: The same at the end of the process.
CLOSE_DEADLINE: Final = 10.0


class _Options(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, kw_only=True):
    """Base of what users give."""


class InetSocket(_Options, tag_field="type", tag="inet"):
    """A TCP port to listen on. ``host`` empty or ``0.0.0.0``, ``::``: all addresses. ``port`` 0: a free one."""

    host: str
    port: str


class UnixSocket(_Options, tag_field="type", tag="unix"):
    """A unix socket to listen on."""

    path: str


class FdSocket(_Options, tag_field="type", tag="fd"):
    """A listening socket that this process was started with: the number of its file descriptor."""

    text: str = msgspec.field(name="str")


SocketAddress = InetSocket | UnixSocket | FdSocket


class ServerOptions(_Options):
    """The NBD server, with the names of QEMU's storage daemon (``--nbd-server``)."""

    addr: SocketAddress
    tls_creds: Annotated[str | None, Meta(description="Id of a tls-creds-x509 object: TLS is required.")] = None
    tls_authz: Annotated[str | None, Meta(description="Not supported.")] = None
    max_connections: Annotated[int, Meta(ge=0, le=0xFFFFFFFF, description="0: no limit.")] = 0


class BitmapName(_Options):
    """A dirty bitmap of a certain node."""

    node: str
    name: str


class ExportOptions(_Options):
    """A block export, with QEMU's names (``block-export-add``, ``--export``)."""

    type: Annotated[Literal["nbd"], Meta(description="There are NBD exports only.")]
    id: Annotated[str, Meta(description="Names the export in commands and events.")]
    node_name: Annotated[str, Meta(description="The node that is exported.")]
    name: Annotated[str | None, Meta(description="What clients ask for. By default the node's name.")] = None
    description: Annotated[str, Meta(description="For people, in what the server lists; 4096 bytes at most.")] = ""
    writable: Annotated[bool, Meta(description="Clients may write.")] = False
    writethrough: Annotated[bool, Meta(description="Every write is durable before it is answered.")] = False
    bitmaps: Annotated[list[str | BitmapName], Meta(
        description="Shown as qemu:dirty-bitmap:NAME. Plain names are looked for in the node and those under it."
    )] = msgspec.field(default_factory=list)
    allocation_depth: Annotated[bool, Meta(description="Show qemu:allocation-depth.")] = False


class NotRunning(BlockstepError):
    """There is no NBD server; nothing was changed."""

    def __init__(self) -> None:
        super().__init__("the NBD server is not running")


class ExportNotFound(BlockstepError):
    """No export has this id."""

    def __init__(self, id: str) -> None:
        super().__init__(f"there is no export with id '{id}'")
        self.id = id


class BlockExport(msgspec.Struct, eq=False):
    """An export of the table."""

    options: ExportOptions
    backend: Backend
    served: Export
    server: Server
    #: Called at its end: others may use the bitmaps again that it shows.
    let_go: list[Callable[[], None]]
    shutting_down: bool = False
    held: bool = False
    #: When it is gone: why its node could not be flushed or closed.
    failed: list[OSError] = msgspec.field(default_factory=list)
    gone: asyncio.Event = msgspec.field(default_factory=asyncio.Event)

    @property
    def id(self) -> str:
        return self.options.id

    @property
    def node(self) -> Driver:
        """The node that it uses now."""
        return self.backend.node

    @property
    def is_guests(self) -> bool:
        """Whether its clients are guests: see the module."""
        return not any(isinstance(edge.parent, Node) for edge in self.node.parents)

    def hold(self) -> None:
        """Let requests wait from now on."""
        if not self.held:
            self.held = True
            self.backend.pause()

    def release(self) -> None:
        """Let them go on."""
        if self.held:
            self.held = False
            self.backend.resume()


class ExportTable:
    """The NBD server of a process and its exports. All methods belong to the thread of the event loop."""

    def __init__(self, graph: Graph, report: Callable[[str, Mapping[str, Any]], None],
                 credentials: Callable[[str], ssl.SSLContext]) -> None:
        """``report`` gets the events. ``credentials`` gives the TLS context of a server for the id of an object."""
        self._graph = graph
        self._report = report
        self._credentials = credentials
        self._server: Server | None = None
        self._tls = False
        self._exports: dict[str, BlockExport] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._guests_held = False
        self._accepting = True
        #: Where the server listens, with the port that port 0 became; passed sockets without a name are left out.
        self.addresses: list[Address] = []

    # --- the server ---

    @property
    def running(self) -> bool:
        """Whether there is a server."""
        return self._server is not None

    async def start_server(self, addresses: Sequence[SocketAddress], *, tls_creds: str | None = None,
                           tls_authz: str | None = None, max_connections: int = 0) -> list[Address]:
        """Listen at all of ``addresses``, or at none. With ``tls_creds`` all clients must speak TLS.

        Returns where it listens. Raises OptionError; OSError that names the address; BlockstepError if there is
        a server already.
        """
        if self._server is not None:
            raise BlockstepError("the NBD server is running already")
        if tls_authz is not None:
            raise OptionError("tls-authz", tls_authz, "absent: there are no authorization objects; "
                              "verify-peer of the credentials lets in only clients whom the CA knows")
        context = None if tls_creds is None else self._credentials(tls_creds)
        server = Server(tls="off" if context is None else "required", tls_context=context,
                        max_connections=max_connections, accepting=self._accepting)
        self._server, self._tls = server, context is not None  # from here on a second start is refused
        listening: list[Address] = []
        try:
            for address in addresses:
                listening += await _listen(server, address)
            if self._server is not server:
                raise BlockstepError("the NBD server was stopped while it was being started")
        except BaseException as error:
            with noting(error):
                await self._end(server, 0.0)
            raise
        self.addresses = listening
        return listening

    def hold_clients(self) -> None:
        """Let those who connect wait, until `accept_clients`: while it is being made what they are to find."""
        self._accepting = False

    def accept_clients(self) -> None:
        """Serve those who wait, and all who come."""
        self._accepting = True
        if self._server is not None:
            self._server.accept()

    async def stop_server(self, deadline: float = STOP_DEADLINE) -> None:
        """Accept nobody any more, answer what was received, cut off who has not ended after ``deadline`` seconds.

        The exports go with the server; those whose requests have not ended in their disks by then go when they
        have. Raises NotRunning; when all has ended, OSError for nodes that could not be flushed or closed.
        """
        if self._server is None:
            raise NotRunning
        _raise(await self._end(self._server, deadline))

    async def _end(self, server: Server, deadline: float) -> list[OSError]:
        if self._server is server:
            self._server, self.addresses = None, []
        mine = [export for export in self._exports.values() if export.server is server and not export.shutting_down]
        for export in mine:
            export.shutting_down = True
        await self._to_its_end(self._take_down(server, mine, deadline))
        return [error for export in mine for error in export.failed]

    async def _take_down(self, server: Server, exports: Sequence[BlockExport], deadline: float) -> None:
        await server.stop(deadline)
        for export in exports:
            await self._let_go(export)

    async def close(self, deadline: float = CLOSE_DEADLINE) -> list[OSError]:
        """The end of the process: stop the server if there is one, and wait until all exports are gone.

        Requests that are held back fail. Returns the errors of nodes that could not be flushed or closed.
        """
        exports = list(self)
        for export in exports:
            if export.held:
                export.backend.forget_held()
        if self._server is not None:
            await self._end(self._server, deadline)
        for export in exports:
            await export.gone.wait()
        return [error for export in exports for error in export.failed]

    # --- guests ---

    async def hold_guests(self) -> None:
        """Hold back the requests of guests, wait for those in flight, and flush their disks.

        Guests that come later are held back as well. Raises OSError if a flush fails; they are held back all the same,
        and the other disks are flushed.
        """
        self._guests_held = True
        held = [export for export in self if export.is_guests]
        for export in held:
            export.hold()
        for export in held:
            await export.backend.idle()
        ends = [await tried(export.node, self._graph.flush(export.node)) for export in held
                if not export.backend.read_only and not export.gone.is_set()]
        _raise([error for error in ends if error is not None])

    def release_guests(self) -> None:
        """Let them go on."""
        self._guests_held = False
        for export in self:
            export.release()

    # --- exports ---

    def uris(self, export: BlockExport) -> list[str]:
        """Where clients find an export: an NBD URI for each address of the server."""
        return [str(NbdUri(address, export.served.name, tls=self._tls)) for address in self.addresses]

    def __iter__(self) -> Iterator[BlockExport]:
        """All exports, in the order in which they were added; those that are shutting down too."""
        return iter(list(self._exports.values()))

    def find(self, id: str) -> BlockExport:
        """The export with that id. Raises ExportNotFound."""
        try:
            return self._exports[id]
        except KeyError:
            raise ExportNotFound(id) from None

    async def add(self, options: ExportOptions) -> BlockExport:
        """Export a node. At return clients can reach it.

        Raises NotRunning; OptionError (an id or a name that is taken, an unknown node or bitmap); GraphError for
        a node that cannot be written to or whose users do not share that. Then nothing was changed.
        """
        server = self._server
        check_name("id", options.id)
        if options.id in self._exports:
            raise OptionError("id", options.id, "an id that no other export has")
        node = self._graph.nodes.get(options.node_name)
        if node is None:
            raise OptionError("node-name", options.node_name, "the name of a node")
        if server is None:
            raise NotRunning
        if options.writable and node.read_only:
            raise OptionError("writable", True, f"false: node '{node.name}' is read-only")
        bitmaps = _find_bitmaps(self._graph, node, options)
        permission = READ | WRITE if options.writable else READ
        backend = self._graph.accounts.attach(node, f"export '{options.id}'", permission)
        try:
            served = Export(
                node.name if options.name is None else options.name,
                Writethrough(backend) if options.writethrough else backend,
                description=options.description, bitmaps=bitmaps, allocation_depth=options.allocation_depth)
            server.add(served)
        except BaseException as error:
            with noting(error):
                await self._graph.detach_backend(backend)
            raise
        shown = [bitmap.show(f"export '{options.id}'") for bitmap in bitmaps.values()]
        export = BlockExport(options, backend, served, server, shown)
        backend.on_revoke = lambda reason: _cut_off(export, reason)
        self._exports[options.id] = export
        if self._guests_held and export.is_guests:
            export.hold()
        return export

    async def remove(self, id: str, mode: Literal["safe", "hard"] = "safe") -> None:
        """Take an export away. At return no client can reach it.

        "safe" raises ExportInUse if it has clients; "hard" cuts them off. It is gone when what they had started
        has ended in the disk: at return if there is nothing, else later. Raises ExportNotFound, or BlockstepError
        if it is shutting down already; when it is gone, OSError if its node could not be flushed or closed.
        """
        export = self.find(id)
        if export.shutting_down:
            raise BlockstepError(f"export '{id}' is shutting down already")
        if mode == "safe" and export.served.connections:
            raise ExportInUse(id, len(export.served.connections))
        export.shutting_down = True
        await export.server.remove(export.served.name, "hard")
        await self._let_go(export)
        _raise(export.failed)

    async def _let_go(self, export: BlockExport) -> None:
        busy = export.served.in_flight or export.backend.in_flight
        retiring = self._to_its_end(self._retire(export))
        if not busy:
            await retiring

    def _to_its_end(self, work: Coroutine[Any, Any, None]) -> asyncio.Future[None]:
        """Do what must not be left half done: it goes on also if whoever waits for it is cancelled, or does not."""
        task = asyncio.get_running_loop().create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return asyncio.shield(task)

    async def _retire(self, export: BlockExport) -> None:
        export.backend.forget_held()
        await export.served.wait_idle()
        node, ends = export.node, list[OSError | None]()
        try:
            if node.parents == [export.backend.edge] and not node.owned and not node.read_only:  # it goes, too
                ends.append(await tried(node, self._graph.flush(node)))
            ends.append(await tried(node, self._graph.detach_backend(export.backend)))
            export.failed = [error for error in ends if error is not None]
        finally:
            for let_go in export.let_go:
                let_go()
            del self._exports[export.id]
            export.gone.set()
            self._report("BLOCK_EXPORT_DELETED", {"id": export.id})


class Writethrough:
    """A backend whose every write is durable when it ends."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.pread = backend.pread
        self.begin_read = backend.begin_read
        self.discard = backend.discard
        self.flush = backend.flush
        self.block_status = backend.block_status

    @property
    def length(self) -> int:
        return self._backend.length

    @property
    def read_only(self) -> bool:
        return self._backend.read_only

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        await self._backend.pwrite(offset, data, flags | FUA)

    def begin_write(self, offset: int, data: Buffer) -> Coroutine[Any, Any, None]:
        return self.pwrite(offset, data)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self._backend.write_zeroes(offset, length, flags | FUA)


async def _listen(server: Server, address: SocketAddress) -> list[Address]:
    if isinstance(address, InetSocket):
        wanted = parse_port(address.port, "addr.port")
        return [InetAddress(host, port) for host, port in await server.start_tcp(address.host, wanted)]
    if isinstance(address, UnixSocket):
        await server.start_unix(address.path)
        return [UnixAddress(address.path)]
    try:
        if not stat.S_ISSOCK(os.fstat(int(address.text)).st_mode):
            raise ValueError
        with socket.socket(fileno=os.dup(int(address.text))) as sock:
            family, name = sock.family, sock.getsockname()
    except (ValueError, OverflowError, OSError):
        raise OptionError("addr.str", address.text, "the number of an open socket") from None
    server.start_fd(int(address.text))
    if family == socket.AF_UNIX:
        return [UnixAddress(name)] if isinstance(name, str) and name else []
    return [InetAddress(name[0], name[1])]


def _raise(errors: list[OSError]) -> None:
    """Raise the first, if there is one, with the others as its notes."""
    for error in errors[1:]:
        errors[0].add_note(f"and then: {told(error)}")
    for error in errors:
        raise error


def _find_bitmaps(graph: Graph, node: Driver, options: ExportOptions) -> dict[str, DirtyBitmap]:
    found: dict[str, DirtyBitmap] = {}
    for wanted in options.bitmaps:
        if isinstance(wanted, str):
            bitmap = next((one.bitmaps[wanted] for one in node.chain() if wanted in one.bitmaps), None)
            if bitmap is not None and bitmap.enabled and not options.writable and not node.read_only:
                raise OptionError("bitmaps", wanted, "disabled, in a read-only export of a node that others can write")
        else:
            owner = graph.nodes.get(wanted.node)
            bitmap = owner.bitmaps.get(wanted.name) if owner is not None else None
            wanted = wanted.name
        if bitmap is None:
            raise OptionError("bitmaps", wanted, "the name of a dirty bitmap of the node")
        if bitmap.busy is not None:
            raise OptionError("bitmaps", wanted, f"a bitmap that nobody uses; it is in use by {bitmap.busy}")
        if bitmap.inconsistent:
            raise OptionError("bitmaps", wanted, "a bitmap that is not inconsistent: this one was not stored in order")
        if wanted in found:
            raise OptionError("bitmaps", wanted, "given once")
        found[wanted] = bitmap
    return found


def _cut_off(export: BlockExport, reason: str) -> None:
    for connection in list(export.served.connections):
        connection.abort(ConnectionAbortedError(errno.ECONNABORTED, f"export '{export.id}': {reason}"))
