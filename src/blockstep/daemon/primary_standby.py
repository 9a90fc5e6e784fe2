"""A primary's way to its standby: the control connection, and two NBD connections for each disk.

NAME-standby is the link's: each of its requests has ``max-stall`` for its deadline. NAME-sync has none: what may take
long without harm goes there, syncs and the flushes that make a checkpoint durable. Over the control connection the
standby is asked all the time whether it is there. Its answer says what has become of its files, and the question what
has become of this side's, so that each end can tell of both.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from blockstep.block.graph import Graph
from blockstep.block.permissions import Role
from blockstep.daemon.files import Files
from blockstep.daemon.good_end import successor
from blockstep.daemon.primary_setup import PrimaryConfig, PrimaryDisk
from blockstep.drivers.nbd import Nbd
from blockstep.errors import BlockstepError, ConnectionLost, PeerRefused, noting
from blockstep.nbd.tls import client_context
from blockstep.qmp.client import Connection, open_connection
from blockstep.qmp.errors import CommandRefused
from blockstep.replication import coordinator as c


class StandbySide:
    """The connections. ``post`` takes what they meet to the coordinator; ``spawn`` runs what watches them.

    ``files`` are this side's, and ``changed`` is called when `faults` has become other than it was while connected.
    """

    def __init__(self, config: PrimaryConfig, graph: Graph, disks: Mapping[str, PrimaryDisk], files: Files,
                 post: Callable[[c.Event], None], spawn: Callable[[Coroutine[Any, Any, None]], object],
                 changed: Callable[[], None]) -> None:
        self._config, self._graph, self._disks, self._files = config, graph, disks, files
        self._post, self._spawn, self._changed = post, spawn, changed
        #: The name of this run of the program, and by which the standby may know it.
        self.instance = self.known_as = successor("")
        self.control: Connection | None = None
        #: Bytes that a disk's buffer on the standby may take before a checkpoint is due; 0: there is no limit.
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
        host, port = config.standby.host, config.standby.port
        control = await open_connection((host, port + 1), timeout=max(config.max_stall, 1.0), ssl=self.tls())
        self.known_as = self.instance
        try:
            answer: dict[str, Any] = await control.execute("pair-attach", {
                "pair": config.pair, "instance": self.instance, "silence": 3 * config.max_stall,
                "disks": [{"name": name, "size": disk.link.length} for name, disk in self._disks.items()]})
            if not answer["accepted"]:
                await control.close()
                return answer
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
        self.room = answer["buffer-limit"] // 2
        for disk in self._disks.values():
            disk.wrong = ""
            disk.link.queue = min(config.queue, self.room // 2) if self.room else config.queue
        return answer

    async def _open_nbd(self, name: str, export: str, timeout: float) -> Nbd:
        tls = {"tls-creds": str(self._config.tls)} if self._config.tls else {}
        node = await self._graph.open({
            "driver": "nbd", "node-name": name, "export": export, "timeout": timeout, "discard": "unmap",
            "server": {"type": "inet", "host": self._config.standby.host, "port": self._config.standby.port}, **tls})
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
                if any(disk["buffer-used"] > self.room > 0 for disk in status["disks"]):
                    self._post(c.Due())
                if status["role"] == "promoted" or status["state"] == "stopped":
                    self._post(c.Refused(f"standby '{pair}' is {status['state']}; this side is stale"))
                    return
                if self.control is control:
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
        return await self.control.execute(command, arguments, timeout=max(self._config.max_stall, 1.0))

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

    def cut_off(self) -> Connection | None:
        """At once: what waits for the standby fails. Returns the control connection, to be closed before `detach`."""
        for disk in self._disks.values():
            for node in (disk.standby, disk.sync):
                if node:
                    node.yank()
        control, self.control = self.control, None
        self.faults = {}
        return control

    async def detach(self) -> None:
        """Close the disks' connections."""
        for disk in self._disks.values():
            if "target" in disk.link.children:
                with self._graph.change() as change:
                    change.detach(disk.link.target)
            standby, sync, disk.standby, disk.sync = disk.standby, disk.sync, None, None
            for node in (standby, sync):
                if node:
                    await self._graph.close(node)
