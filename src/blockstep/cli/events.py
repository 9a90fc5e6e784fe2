"""``blockstep events``: what happens to a pair, as it happens."""

from __future__ import annotations

import json
from datetime import datetime

from blockstep.cli.control import Json, PairName, Qmp, ask, find_socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from blockstep.qmp.client import Connection


def events(pair: PairName = None, json_: Json = False, qmp: Qmp = None) -> None:
    """Print the state now, and every event from then on, one a line, until the program ends or Ctrl-C.

    A line is: time, event, and key:value for each fact. The first line (``exists``) is the state now.
    """

    async def talk(connection: Connection) -> None:
        stream = connection.events()
        status = await connection.execute("query-replication")
        facts = {key: status[key] for key in ("pair", "role", "state", "health", "reason")}
        _print("exists", facts, datetime.now(), json_)
        async for event in stream:
            stamp = event["timestamp"]
            when = datetime.fromtimestamp(stamp["seconds"] + stamp["microseconds"] / 1e6)
            _print(event["event"], event.get("data", {}), when, json_)

    ask(find_socket(pair, None, qmp), talk)


def _print(name: str, facts: dict[str, Any], when: datetime, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"time": when.timestamp(), "event": name, "data": facts}), flush=True)
    else:
        words = " ".join(f"{key}:{_word(value)}" for key, value in facts.items() if value != "")
        print(f"{when.isoformat(timespec='milliseconds')} {name} {words}", flush=True)


def _word(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return json.dumps(text) if " " in text else text
