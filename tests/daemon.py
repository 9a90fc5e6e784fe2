"""A storage daemon inside the test, with a monitor on it.

    @scenario
    async def test_something(tmp_path):
        async with daemon(tmp_path) as d:
            await d.qmp("blockdev-add", {"driver": "null", "node-name": "disk"})
            await d.qmp("blockdev-del", {"node-name": "disk"})
            assert "disk" not in d.inventory.graph.nodes
            await d.event("JOB_STATUS_CHANGE", status="concluded")

A command that is refused raises `CommandRefused`, with QMP's ``error_class`` and ``description``; `refused` says what
a test expects of it. Several daemons live in one test when each has its own ``name``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from blockstep import drivers as _drivers  # noqa: F401  registers them
from blockstep.daemon.storage import StorageDaemon
from blockstep.inventory.inventory import Inventory
from blockstep.qmp.client import Connection, connect
from blockstep.qmp.errors import CommandRefused

#: Seconds that an event or an answer may take.
LIMIT = 20.0


class Daemon:
    """A running daemon. ``path`` is its socket, for more monitors; ``events`` what it has sent, oldest first."""

    def __init__(self, program: StorageDaemon, path: Path, client: Connection) -> None:
        self.program, self.path, self.client = program, path, client
        self.events: list[dict[str, Any]] = []
        self._came = asyncio.Event()

    @property
    def inventory(self) -> Inventory:
        return self.program.inventory

    async def qmp(self, command: str, arguments: Mapping[str, Any] | None = None, **more: Any) -> Any:
        """The result of a command. Raises CommandRefused."""
        return await self.client.execute(command, {**(arguments or {}), **more})

    async def event(self, name: str, /, after: int = 0, **data: Any) -> dict[str, Any]:
        """Wait for an event with these values in its data, and return its data; ``after``: so many of `events`."""
        async with asyncio.timeout(LIMIT):
            while True:
                for event in self.events[after:]:
                    found: dict[str, Any] = event.get("data", {})
                    if event["event"] == name and all(found.get(key) == value for key, value in data.items()):
                        return found
                self._came.clear()
                await self._came.wait()

    async def _listen(self) -> None:
        async for event in self.client.events():
            self.events.append(event)
            self._came.set()


@asynccontextmanager
async def daemon(directory: Path, name: str = "daemon") -> AsyncIterator[Daemon]:
    """A daemon with every command; it is closed in good order at the end."""
    program = StorageDaemon(name)
    path = directory / f"{name}.qmp"
    try:
        await program.qmp.start_unix(path)
        async with connect(path, timeout=LIMIT) as client:
            running = Daemon(program, path, client)
            listening = asyncio.ensure_future(running._listen())
            await asyncio.sleep(0)  # it subscribes
            try:
                yield running
            finally:
                listening.cancel()
    finally:
        await program.close()
    assert not program.inventory.graph.nodes, "nodes that were not closed"


@contextmanager
def refused(error_class: str = "GenericError", match: str = "") -> Iterator[None]:
    """The command inside is refused with that class, and a description that matches."""
    with pytest.raises(CommandRefused, match=match or None) as caught:
        yield
    assert caught.value.error_class == error_class
