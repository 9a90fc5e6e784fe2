"""The shell at a terminal.

Events are printed as they come, above the line that is being typed. The history is a file that only its owner can
read; lines that begin with a blank, and lines with a secret, are not written there.

The line editor is prompt_toolkit; it runs in the loop of the connection, so that nothing here needs a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncGenerator, Coroutine
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import CompleteEvent, Completer
from prompt_toolkit.completion import Completion as Item
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.patch_stdout import patch_stdout
from rich.console import Console
from rich.json import JSON
from rich.text import Text

from blockstep.errors import BlockstepError
from blockstep.qmp.client import Events
from blockstep.qmp.errors import CommandRefused
from blockstep.shell.complete import Candidate, complete, matching
from blockstep.shell.server import Server
from blockstep.shell.words import WordError

#: The file of the history, in the user's state directory.
HISTORY: Final = "blockstep/shell-history"


def history_file() -> Path:
    """``$XDG_STATE_HOME/blockstep/shell-history``; ``~/.local/state`` if that is not set."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / HISTORY


class PrivateHistory(FileHistory):
    """A history that remembers nothing that was not to be remembered."""

    def store_string(self, string: str) -> None:
        """Append a line to the file, unless it begins with a blank or names a secret."""
        if not string.startswith(" ") and "secret" not in string:
            super().store_string(string)


def open_history() -> History:
    """The user's history; one that lasts as long as the shell where it cannot be kept."""
    path = history_file()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return PrivateHistory(str(path))


class Tab(Completer):
    """What Tab offers."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> list[Item]:
        """Nothing: names are asked for, so completion is a coroutine."""
        return []

    async def get_completions_async(
        self, document: Document, complete_event: CompleteEvent
    ) -> AsyncGenerator[Item, None]:
        """The candidates for the text before the cursor, with names of what the server holds now."""
        line = document.text_before_cursor
        start, candidates, things = complete(line, self._server.catalogue)
        if things:
            names = [Candidate(name) for name in await self._server.names(things)]
            candidates = [*candidates, *matching(line[start:], names)]
        for candidate in candidates:
            yield Item(candidate.text, start - len(line), display_meta=candidate.about)


async def interact(server: Server, prompt: str, history: History | None = None) -> None:
    """Read lines and execute them until Ctrl-D or ``exit``. Raises ConnectionLost when the server goes."""
    session: PromptSession[str] = PromptSession(
        history=history or open_history(), completer=Tab(server), complete_while_typing=False,
        auto_suggest=AutoSuggestFromHistory(), enable_history_search=True)
    console = Console(highlight=False, soft_wrap=True)
    events = server.qmp.events()
    with patch_stdout(raw=True):
        console.print(f"{server.title}. Tab completes, help COMMAND explains, Ctrl-D leaves.")
        watcher = asyncio.ensure_future(_watch(events, console, session))
        try:
            while True:
                try:
                    line = (await session.prompt_async(prompt)).rstrip()
                except KeyboardInterrupt:
                    continue
                except EOFError:
                    return
                if line.split()[:1] == ["exit"]:
                    return
                if line.strip() and await _run(server, line, console) and line.split() == ["quit"]:
                    return
        finally:
            events.close()
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError, BlockstepError, OSError):
                await watcher


async def _run(server: Server, line: str, console: Console) -> bool:
    """Execute a line and show what comes of it. Returns whether it was done."""
    if line.split()[0] == "help":
        console.print(Text(server.help(line)))
        return True
    try:
        console.print(JSON.from_data(await _unless_interrupted(server.execute(line))))
    except _Interrupted:
        console.print(Text("not waited for any longer; the server may still be at it", "yellow"))
    except CommandRefused as error:
        console.print(Text(f"{error.error_class}: {error.description}", "red"))
    except (WordError, TimeoutError) as error:
        console.print(Text(str(error), "red"))
    else:
        return True
    return False


class _Interrupted(Exception):
    """Ctrl-C, while an answer was waited for."""


async def _unless_interrupted(answer: Coroutine[Any, Any, Any]) -> Any:
    """What is awaited. Raises _Interrupted at Ctrl-C, which is a signal here: there is no prompt to read the key."""
    loop, waiting = asyncio.get_running_loop(), asyncio.ensure_future(answer)
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        waiting.cancel()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        return await waiting
    except asyncio.CancelledError:
        if interrupted:
            raise _Interrupted from None
        raise
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def _watch(events: Events, console: Console, session: PromptSession[str]) -> None:
    try:
        async for event in events:
            console.print(_event(event))
    except (BlockstepError, OSError) as error:
        if not session.app.is_running:
            raise  # whatever runs now meets the same error
        session.app.exit(exception=error)


def _event(event: dict[str, Any]) -> Text:
    stamp = event["timestamp"]
    when = datetime.fromtimestamp(stamp["seconds"] + stamp["microseconds"] / 1e6).isoformat(timespec="milliseconds")
    return Text.assemble((when, "dim"), " ", (event["event"], "bold magenta"), " ", json.dumps(event.get("data", {})))
