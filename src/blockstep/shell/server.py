"""The server at the other end of a shell: what it offers, the names of what it holds, one line's execution."""

from __future__ import annotations

import contextlib
from typing import Any, Final

from blockstep.errors import BlockstepError
from blockstep.qmp.client import Connection
from blockstep.qmp.errors import CommandRefused
from blockstep.shell.catalogue import Catalogue
from blockstep.shell.complete import Things, explain
from blockstep.shell.words import parse

#: For each kind of things: the command that lists them, its arguments, and the member that is the name.
_LISTS: Final[dict[Things, tuple[str, dict[str, Any], str]]] = {
    "nodes": ("query-named-block-nodes", {"flat": True}, "node-name"),
    "jobs": ("query-jobs", {}, "id"),
    "exports": ("query-block-exports", {}, "id"),
}
#: Seconds that a command may take; and a question on behalf of Tab.
LIMIT: Final = 600.0
_SOON: Final = 1.0


class Server:
    """A connection, and the catalogue of what its server offers."""

    def __init__(self, qmp: Connection, catalogue: Catalogue) -> None:
        self.qmp, self.catalogue = qmp, catalogue

    @classmethod
    async def of(cls, qmp: Connection) -> Server:
        """Ask the server what it offers. Raises what `Connection.execute` does."""
        schema: list[Any] = []
        with contextlib.suppress(CommandRefused):
            schema = await qmp.execute("query-qmp-schema")
        commands = await qmp.execute("query-commands")
        return cls(qmp, Catalogue(schema, [command["name"] for command in commands]))

    @property
    def title(self) -> str:
        """Who it says that it is."""
        version = self.qmp.greeting["version"]
        package = str(version["package"])
        if package.startswith("blockstep"):
            return package
        return "QEMU " + ".".join(str(version["qemu"][part]) for part in ("major", "minor", "micro"))

    async def execute(self, line: str) -> Any:
        """The result of a line. Raises WordError, then nothing was sent; or what `Connection.execute` does."""
        request = parse(line, self.catalogue)
        return await self.qmp.execute(request.command, request.arguments or None, timeout=LIMIT,
                                      out_of_band=request.out_of_band)

    async def names(self, things: Things) -> list[str]:
        """The names of what it holds now; none if it does not tell, or not soon."""
        command, arguments, member = _LISTS[things]
        try:
            return [str(one[member]) for one in await self.qmp.execute(command, arguments, timeout=_SOON)]
        except (BlockstepError, OSError):
            return []

    def help(self, line: str) -> str:
        """The answer to ``help`` or ``help COMMAND``."""
        _, *words = line.split()
        if not words:
            return "\n".join(self.catalogue.commands)
        command = self.catalogue.command(words[0])
        if command not in self.catalogue.commands:
            return f"there is no command {words[0]}"
        return explain(command, self.catalogue) or f"{command} takes no arguments that the server tells of"
