"""How a storage daemon becomes what its command line says: one option after the other, in the order given.

That order is the user's: ``--object`` before what names it, ``--blockdev`` bottom up, ``--nbd-server`` before
``--export``. Each option is done when the next one begins. The first that fails ends the program, and nothing of it is
left behind.

Sockets listen from their option on, but whoever connects is served when all options are done and the pidfile is
written: nobody finds a half of what the command line says, and who is answered can read the process id.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from blockstep import keyval
from blockstep.daemon.chardev import SWITCHES, Chardev, ChardevOptions, StdioOptions, open_chardev, passed_socket
from blockstep.daemon.daemonize import PidFile
from blockstep.daemon.storage import StorageDaemon
from blockstep.errors import BlockstepError, OptionError, told
from blockstep.inventory.exports import ExportOptions, FdSocket, ServerOptions, SocketAddress, UnixSocket
from blockstep.qmp.commands.objects import ObjectArguments

#: How much of an option's text an error shows.
_LONGEST_SHOWN: Final = 120


class DaemonConfig(msgspec.Struct, frozen=True):
    """What ``blockstep daemon`` was told. ``steps``: (option without its hyphens, its text) in their order.

    ``passed``: listening sockets that were handed over, by name (its number, if it has none). ``background``: there
    will be no standard input and output.
    """

    steps: Sequence[tuple[str, str]]
    name: str | None = None
    pidfile: str | None = None
    passed: Mapping[str, int] = msgspec.field(default_factory=dict)
    background: bool = False


class MonitorOptions(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """``--monitor``."""

    chardev: Annotated[str, Meta(description="The character device.")]
    mode: Annotated[Literal["control"], Meta(description="QMP; there is no other.")] = "control"
    pretty: Annotated[bool, Meta(description="Lay out what is sent, for people.")] = False
    id: Annotated[str | None, Meta(description="Of no effect.")] = None


async def main(config: DaemonConfig, ready: Callable[[], None]) -> None:
    """Be the daemon, until a signal or the command ``quit``.

    ``ready`` is called when everything is served. Raises BlockstepError or OSError: an option was wrong or could not
    be carried out, or another program has the pidfile; or, at the end, a disk could not be flushed.
    """
    program = StorageDaemon(config.name)
    startup = Startup(program, config.passed, config.background)
    pidfile: PidFile | None = None
    try:
        try:
            if await _unless_told_to_stop(program, startup.run(config.steps)):
                if config.pidfile is not None:
                    pidfile = _pidfile(config.pidfile)
                await startup.serve()
                ready()
                await program.wait()
        finally:
            lost = await program.close()
    finally:
        startup.close()
        if pidfile is not None:
            pidfile.remove()
    if lost:
        raise BlockstepError("at the end: " + "; ".join(error.strerror or str(error) for error in lost))


async def _unless_told_to_stop(program: StorageDaemon, work: Coroutine[Any, Any, None]) -> bool:
    """Do the work; give it up if the program is told to stop meanwhile, and return False."""
    doing, told = asyncio.ensure_future(work), asyncio.ensure_future(program.told_to_stop())
    await asyncio.wait((doing, told), return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    if not doing.done():
        doing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await doing
        return False
    doing.result()
    return True


def _pidfile(path: str) -> PidFile:
    try:
        return PidFile(path)
    except (BlockstepError, OSError) as error:
        raise BlockstepError(f"--pidfile {path}: {told(error)}") from error


class Startup:
    """Carries options out, for a program: `run`, then `serve`; at the end `close`."""

    def __init__(self, program: StorageDaemon, passed: Mapping[str, int], background: bool = False) -> None:
        self._program, self._inventory = program, program.inventory
        self._passed, self._background = dict(passed), background
        self.chardevs: dict[str, Chardev] = {}
        self._monitors: dict[str, bool] = {}  # id of its character device -> whether it is pretty
        self._actions: dict[str, Callable[[str], Coroutine[Any, Any, None]]] = {
            "object": self._object, "blockdev": self._blockdev, "nbd-server": self._nbd_server,
            "export": self._export, "chardev": self._chardev, "monitor": self._monitor, "qmp": self._qmp}

    async def run(self, steps: Sequence[tuple[str, str]]) -> None:
        """All of them. Nobody is served yet. Raises BlockstepError that shows the option which failed."""
        self._inventory.exports.hold_clients()
        for option, text in steps:
            try:
                await self._actions[option](text)
            except (BlockstepError, OSError) as error:
                shown = text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
                raise BlockstepError(f"--{option} {shown}: {told(error)}") from error

    async def serve(self) -> None:
        """Serve those who have connected, and all who come."""
        for name, pretty in self._monitors.items():
            chardev = self.chardevs[name]
            if chardev.listens:
                await self._program.qmp.start_socket(chardev.take(), chardev.tls, pretty=pretty)
            else:
                await self._program.qmp.attach(chardev.take(), pretty=pretty)
        self._inventory.exports.accept_clients()

    def close(self) -> None:
        """Remove what the file system has of the character devices."""
        for chardev in self.chardevs.values():
            chardev.close()

    async def _object(self, text: str) -> None:
        tree = keyval.parse(text, "", "qom-type")
        kind: Any = ObjectArguments
        self._inventory.objects.add(keyval.fit(tree, kind, "", words=not keyval.is_json(text)))

    async def _blockdev(self, text: str) -> None:
        options = keyval.parse(text, "", "driver")
        if "node-name" not in options and "driver" in options:
            raise OptionError("node-name", None, "given: the name of the node")
        await self._inventory.graph.open(options, strict=keyval.is_json(text))

    async def _nbd_server(self, text: str) -> None:
        tree = keyval.parse(text, "")
        addresses: list[SocketAddress] = []
        if "addr" not in tree and self._passed:
            addresses = [FdSocket(text=str(passed_socket(name, self._passed, "addr").detach()))
                         for name in [*self._passed]]
            tree["addr"] = {"type": "fd", "str": addresses[0].text}  # type: ignore[union-attr]
        options = keyval.fit(tree, ServerOptions, "", words=not keyval.is_json(text))
        await self._inventory.exports.start_server(
            addresses or [self._address(options.addr)], tls_creds=options.tls_creds, tls_authz=options.tls_authz,
            max_connections=options.max_connections)

    def _address(self, address: SocketAddress) -> SocketAddress:
        if isinstance(address, FdSocket):
            return FdSocket(text=str(passed_socket(address.text, self._passed, "addr.str").detach()))
        if isinstance(address, UnixSocket):
            return UnixSocket(path=os.path.abspath(address.path))  # a daemon leaves the directory
        return address

    async def _export(self, text: str) -> None:
        await self._inventory.exports.add(keyval.read(text, ExportOptions, "", "type"))

    async def _chardev(self, text: str) -> None:
        kind: Any = ChardevOptions
        await self._open_chardev(keyval.read(text, kind, "", "backend", SWITCHES))

    async def _open_chardev(self, options: ChardevOptions) -> None:
        if isinstance(options, StdioOptions) and self._background:
            raise OptionError("backend", "stdio", "socket: with --daemonize there is no standard input")
        if not options.id or options.id in self.chardevs:
            raise OptionError("id", options.id, "a name that no other character device has")
        chardev = self.chardevs[options.id] = await open_chardev(options, self._inventory.objects, self._passed)
        if chardev.listens and getattr(options, "wait", None) is not False:
            await chardev.wait_connected()

    async def _monitor(self, text: str) -> None:
        options = keyval.read(text, MonitorOptions, "", "chardev")
        if options.chardev not in self.chardevs:
            known = f": {', '.join(self.chardevs)}" if self.chardevs else ""
            raise OptionError("chardev", options.chardev, f"the id of a --chardev before it{known}")
        if options.chardev in self._monitors:
            raise OptionError("chardev", options.chardev, "a character device that no other monitor uses")
        self._monitors[options.chardev] = options.pretty

    async def _qmp(self, text: str) -> None:
        tree = _qmp_words(text)
        tree["id"] = name = f"#qmp{len(self.chardevs)}"
        pretty = tree.pop("pretty", "off")
        kind: Any = ChardevOptions
        await self._open_chardev(keyval.fit(tree, kind, "", words=True))
        await self._monitor(f"{name},pretty={pretty}")


def _qmp_words(text: str) -> dict[str, Any]:
    """``unix:PATH,...``, ``tcp:HOST:PORT,...`` or ``stdio`` as the options of a character device."""
    place, _, options = text.replace(",,", "\0").partition(",")
    kind, colon, rest = place.replace("\0", ",").partition(":")
    if place == "stdio":
        return {"backend": "stdio", **keyval.parse(options.replace("\0", ",,"), "", switches=("signal", "pretty"))}
    tree = {"server": "on", **keyval.parse(options.replace("\0", ",,"), "", switches=(*SWITCHES, "pretty"))}
    if keyval.SWITCH.get(tree["server"]):
        tree.setdefault("wait", "off")
    if kind == "unix" and colon:
        return {"backend": "socket", **tree, "path": rest}
    if kind == "tcp" and ":" in rest:
        host, _, port = rest.rpartition(":")
        return {"backend": "socket", **tree, "host": host.strip("[]"), "port": port}
    raise OptionError("SPEC", place, "unix:PATH, tcp:HOST:PORT or stdio, and options after a comma")
