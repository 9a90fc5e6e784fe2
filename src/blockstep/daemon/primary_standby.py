"""A primary's way to its standby: two control connections, and two NBD connections for each disk.

NAME-standby is the link's: each of its requests has ``max-stall`` for its deadline. NAME-sync has none: what may take
long without harm goes there, syncs and the flushes that make a checkpoint durable. Over the control connection the
standby is asked all the time whether it is there. Its answer says what has become of its files, and the question what
has become of this side's, so that each end can tell of both. Over the second one goes what may take long without harm:
what is durable, which the standby notes, and the question what its disks hold.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import ssl
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

import msgspec

from blockstep.block.graph import Graph
from blockstep.block.permissions import Role
from blockstep.daemon.files import Files
from blockstep.daemon.good_end import successor
from blockstep.daemon.ledger import Ledger
from blockstep.daemon.primary_setup import PrimaryConfig, PrimaryDisk
from blockstep.drivers.nbd import Nbd
from blockstep.errors import BlockstepError, ConnectionLost, PeerRefused, ProtocolError, noting
from blockstep.nbd.tls import client_context
from blockstep.qmp.client import Connection, open_connection
from blockstep.qmp.commands.replication import Digests
from blockstep.qmp.errors import CommandRefused
from blockstep.replication import coordinator as c
from blockstep.replication.comparison import Content

#: Seconds: as long as it takes.
_EVER: Final = 1e9


class StandbySide:
    """The connections. ``post`` takes what they meet to the coordinator; ``spawn`` runs what watches them.

    ``files`` are this side's, and ``changed`` is called when `faults` has become other than it was while connected.
    """

    def __init__(self, config: PrimaryConfig, graph: Graph, disks: Mapping[str, PrimaryDisk], files: Files,
                 ledger: Ledger, post: Callable[[c.Event], None], spawn: Callable[[Coroutine[Any, Any, None]], object],
                 changed: Callable[[], None]) -> None:
        self._config, self._graph, self._disks, self._files, self._ledger = config, graph, disks, files, ledger
        #: Seconds for a command and its answer, or for a connection.
        self._patience = max(config.max_stall, 1.0)
        self._post, self._spawn, self._changed = post, spawn, changed
        #: The name of this run of the program, and by which the standby may know it.
        self.instance = self.known_as = successor("")
        self.control: Connection | None = None
        #: For what may take as long as it takes: on the other one the signs of life would wait behind it.
        self._notes: Connection | None = None
        self._prefix = ""
        #: Bytes that a disk's buffer on the standby may take before a checkpoint is due; 0: there is no limit. With a
        #: directory for buffers it is another number each time that the standby is asked.
        self.room = 0
        #: What has become of the files of its disks, by their names, as it said last; nothing of one that is gone.
        self.faults: dict[str, str] = {}

    def tls(self) -> ssl.SSLContext | None:
        """Its TLS, if it has any. Raises OptionError for certificates that are not there."""
        return client_context(self._config.tls, option="--tls") if self._config.tls else None

    # --- coming ---

    def go_on(self, instance: str) -> None:
        """This run goes on where another one has ended."""
        self.instance, self.known_as = successor(instance), instance

    async def attach(self) -> dict[str, Any]:
        """Connect, and put the standby's disks under the links, which stay off. Returns the standby's answer.

        Only if it has ``accepted`` there are connections then. Raises PeerRefused, OSError, BlockstepError,
        TimeoutError; then there are none.
        """
        config = self._config
        control = await self._open_control()
        self.known_as = self.instance
        self._ledger.note(instance=self.instance)
        try:
            answer: dict[str, Any] = await control.execute("pair-attach", {
                "pair": config.pair, "instance": self.instance, "silence": 3 * config.max_stall,
                "disks": [{"name": name, "size": disk.link.length} for name, disk in self._disks.items()]})
            if not answer["accepted"]:
                await control.close()
                return answer
            self._notes, self._prefix = await self._open_control(), answer["prefix"]
            for name, disk in self._disks.items():
                export = answer["prefix"] + name
                disk.standby = await self._open_nbd(f"{name}-standby", export, config.max_stall)
                disk.sync = await self._open_nbd(f"{name}-sync", export, 0.0)
                with self._graph.change() as change:
                    change.attach(disk.link, "target", Role.TARGET, disk.standby)
        except CommandRefused as error:
            await control.close()
            raise PeerRefused(f"the standby refuses: {error}") from None
        except BaseException as error:
            with noting(error):
                await control.close()
                await self.detach()
            raise
        self.control = control
        self._spawn(self._watch(control))
        self._has_room(answer["buffer-limit"])
        for disk in self._disks.values():
            disk.wrong = ""
        return answer

    def _has_room(self, limit: int) -> None:
        """The standby's buffers may hold ``limit`` bytes of a disk; 0: there is no limit."""
        self.room = -(-limit // 2)
        for disk in self._disks.values():
            disk.link.queue = min(self._config.queue, self.room // 2) if limit else self._config.queue

    async def _open_control(self) -> Connection:
        place = self._config.standby.host, self._config.standby.port + 1
        return await open_connection(place, timeout=self._patience, ssl=self.tls())

    async def _open_nbd(self, name: str, export: str, timeout: float) -> Nbd:
        tls = {"tls-creds": str(self._config.tls)} if self._config.tls else {}
        try:
            async with asyncio.timeout(self._patience):
                node = await self._graph.open({
                    "driver": "nbd", "node-name": name, "export": export, "timeout": timeout, "discard": "unmap",
                    "server": {"type": "inet", "host": self._config.standby.host, "port": self._config.standby.port},
                    **tls})
        except TimeoutError:
            raise ConnectionLost(f"{self._config.standby} does not answer", errno.ETIMEDOUT) from None
        assert isinstance(node, Nbd)
        return node

    # --- being there ---

    async def _watch(self, control: Connection) -> None:
        """Hear of the control connection's end; and, by asking, of a standby that answers no more, and of its files."""
        pair, max_stall = self._config.pair, self._config.max_stall
        question: dict[str, Any] = {}
        try:
            while self.control is control:
                status = await control.execute("pair-query", question, timeout=max_stall * 0.75)
                limited = [disk for disk in status["disks"] if disk["buffer-limit"]]
                if any(disk["buffer-used"] * 2 > disk["buffer-limit"] for disk in limited):
                    self._post(c.Due())
                if status["role"] == "promoted" or status["state"] == "stopped":
                    self._post(c.Refused(f"standby '{pair}' is {status['state']}; this side is stale"))
                    return
                if self.control is control:
                    self._has_room(min((disk["buffer-limit"] for disk in limited), default=0))
                    self._hear_faults({disk["name"]: disk.get("fault", "") for disk in status["disks"]})
                await control.ended(max_stall * 0.25)  # then the next question fails
                if all("fault" in disk for disk in status["disks"]):  # else it is of an older version
                    question["faults"] = [{"name": name, "fault": fault} for name, fault in self._files.faults.items()]
        except (OSError, BlockstepError, TimeoutError) as error:
            if self.control is control:
                self._post(c.Failed(getattr(error, "strerror", None) or str(error)))

    def _hear_faults(self, said: dict[str, str]) -> None:
        faults = {name: fault for name, fault in said.items() if fault}
        if faults != self.faults:
            self.faults = faults
            self._changed()

    async def ask(self, command: str, **arguments: Any) -> Any:
        """A command to the standby. Raises ConnectionLost, TimeoutError, CommandRefused."""
        if self.control is None:
            raise ConnectionLost("the standby's control connection is gone")
        return await self.control.execute(command, arguments, timeout=self._patience)

    async def durable(self, epoch: int) -> None:
        """The standby notes that a checkpoint is durable on its disks. Raises ConnectionLost, CommandRefused."""
        if self._notes is None:
            raise ConnectionLost("the standby's control connection is gone")
        await self._notes.execute("pair-durable", {"epoch": epoch, "prefix": self._prefix}, timeout=_EVER)

    async def content(self, disk: str, offset: int, length: int, key: bytes) -> Content | None:
        """What the standby holds of a range of a disk: see `blockstep.replication.comparison`.

        None: it cannot say. Raises ConnectionLost, or ProtocolError for an answer that is none.
        """
        if self._notes is None:
            raise ConnectionLost("the standby's control connection is gone")
        try:
            answer = msgspec.convert(await self._notes.execute("pair-digests", {
                "prefix": self._prefix, "disk": disk, "offset": offset, "length": length,
                "key": base64.b64encode(key).decode()}, timeout=_EVER), Digests)
            content = Content(answer.zeroes, answer.digests)
            content.told(length)
        except CommandRefused:  # it cannot read its disk there, perhaps: a copy mends that, or says what is wrong
            return None
        except ValueError as error:
            raise ProtocolError(f"{self._config.standby}: no answer to 'pair-digests': {error}") from error
        return content

    async def resize(self, disk: str, size: int) -> None:
        """Let the standby's disk follow, if there is a standby. Raises BlockstepError.

        Its cause is CommandRefused if the standby has ended with it.
        """
        if self.control is None:
            return
        try:
            await self.ask("pair-resize", disk=disk, size=size, now=self._disks[disk].link.length)
        except (OSError, BlockstepError, TimeoutError) as error:
            why = error.description if isinstance(error, CommandRefused) else (
                getattr(error, "strerror", None) or str(error) or "no answer in time")
            raise BlockstepError(f"disk '{disk}' of the standby cannot get {size} bytes: {why}") from error

    # --- going ---

    def cut_off(self) -> list[Connection]:
        """At once: what waits for the standby fails. Returns its control connections, to be closed before `detach`."""
        for disk in self._disks.values():
            for node in (disk.standby, disk.sync):
                if node:
                    node.yank()
        gone = [connection for connection in (self.control, self._notes) if connection]
        self.control = self._notes = None
        self.faults = {}
        return gone

    async def detach(self) -> None:
        """Close the disks' connections."""
        if self._notes:
            notes, self._notes = self._notes, None
            await notes.close()
        for disk in self._disks.values():
            if "target" in disk.link.children:
                with self._graph.change() as change:
                    change.detach(disk.link.target)
            standby, sync, disk.standby, disk.sync = disk.standby, disk.sync, None, None
            for node in (standby, sync):
                if node:
                    await self._graph.close(node)
