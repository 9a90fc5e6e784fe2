"""What a monitor can do, for programs: which commands, with which arguments and results, and which events.

Source: QEMU's QMP reference, "QMP introspection".
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec

from blockstep.block.registry import driver_names, options_type
from blockstep.qmp.introspect import AnyEntry, schema
from blockstep.qmp.schema import Arguments, Command, EventKind, Monitor, Registry
from blockstep.qmp.session import NEGOTIATION

commands = Registry()

_Question = tuple[tuple[Command, ...], tuple[EventKind, ...], tuple[str, ...]]

#: Answers that were given, as they are sent. There are as many as listeners that offer different commands.
_answers: Final[dict[_Question, Any]] = {}
_MOST: Final = 4


@commands.command("query-qmp-schema")
async def query_qmp_schema(context: object, args: Arguments, monitor: Monitor) -> list[AnyEntry]:
    """The commands and events of this monitor, and all types that they use.

    Commands and events have their true names; types have names that may change.
    """
    question = (NEGOTIATION, *monitor.commands.values()), tuple(monitor.events.values()), tuple(driver_names())
    if question not in _answers:
        answer = await asyncio.to_thread(_answer, question)  # some 30 ms, for which no disk shall wait
        while len(_answers) >= _MOST:
            _answers.pop(next(iter(_answers)))
        _answers[question] = answer
    found: list[AnyEntry] = _answers[question]
    return found


def _answer(question: _Question) -> msgspec.Raw:
    offered, events, _ = question
    return msgspec.Raw(msgspec.json.encode(schema(offered, events, {"driver": options_type})))
