#!/usr/bin/env python3
"""A script that drives block replication through QMP, as a cluster agent does: it knows QEMU, and nothing of us.

    drive_replication.py DIRECTORY PRIMARY_QMP SECONDARY_QMP PORT OVERLAY

PRIMARY_QMP and SECONDARY_QMP are the sockets of two storage daemons or QEMUs that hold nothing yet. In DIRECTORY are
primary.img and secondary.img, raw and alike, and active.img and hidden.img, empty images of the format OVERLAY. The
secondary's NBD server gets PORT of 127.0.0.1; the primary's, for guests, is primary.nbd in DIRECTORY, and what the
standby's guest would see is exported as well.

It reads lines from its input, does what they say, and prints one line for each: the name, and the answers.

    setup         nodes, servers, exports, and the link between them
    start         replication, on the secondary first
    checkpoint
    status        of both
    failover      on the secondary, until it has ended
    detach        the primary goes on without the secondary
    wrong         what must be refused, on both: the classes of the errors
    teardown      everything that setup made

Only the standard library is used.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from typing import Any


class Refused(Exception):
    """An error of a command; the text is its class."""


class Monitor:
    """A QMP connection."""

    def __init__(self, path: str) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(50)
        sock.connect(path)
        self._file = sock.makefile("rwb")
        json.loads(self._file.readline())
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._file.write(json.dumps({"execute": command, "arguments": words}).encode() + b"\n")
        self._file.flush()
        while True:
            message = json.loads(self._file.readline())
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise Refused(message["error"]["class"], command, message["error"]["desc"])

    def refuses(self, command: str, **arguments: Any) -> str:
        """The class of the error."""
        try:
            return f"nothing: {self(command, **arguments)}"
        except Refused as error:
            return str(error.args[0])


class Pair:
    """The two programs, and what can be done with them."""

    def __init__(self, directory: str, primary: str, secondary: str, port: str, overlay: str) -> None:
        self.directory, self.port, self.overlay = directory, port, overlay
        self.primary, self.secondary = Monitor(primary), Monitor(secondary)

    def setup(self) -> list[Any]:
        overlay = {"driver": self.overlay, "file": {"driver": "file", "filename": f"{self.directory}/active.img"},
                   "backing": {"driver": self.overlay, "node-name": "hidden0", "backing": "parent0",
                               "file": {"driver": "file", "filename": f"{self.directory}/hidden.img"}}}
        s, p = self.secondary, self.primary
        s("blockdev-add", driver="raw", node_name="parent0",
          file={"driver": "file", "filename": f"{self.directory}/secondary.img"})
        s("blockdev-add", driver="replication", node_name="childs0", mode="secondary", top_id="colo-disk0",
          file={"node-name": "active0", **overlay})
        s("blockdev-add", driver="quorum", node_name="colo-disk0", read_pattern="fifo", vote_threshold=1,
          children=["childs0"])
        s("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": self.port}})
        s("nbd-server-add", device="parent0", writable=True)
        s("block-export-add", type="nbd", id="view", node_name="colo-disk0", name="view", writable=True)
        p("blockdev-add", driver="raw", node_name="primary0",
          file={"driver": "file", "filename": f"{self.directory}/primary.img"})
        p("blockdev-add", driver="quorum", node_name="colo-disk0", read_pattern="fifo", vote_threshold=1,
          children=["primary0"])
        p("nbd-server-start", addr={"type": "unix", "data": {"path": f"{self.directory}/primary.nbd"}})
        p("block-export-add", type="nbd", id="guest", node_name="colo-disk0", name="guest", writable=True)
        p("blockdev-add", driver="replication", node_name="replication0", mode="primary",
          file={"driver": "nbd", "node-name": "nbd0", "export": "parent0",
                "server": {"type": "inet", "host": "127.0.0.1", "port": self.port}})
        p("x-blockdev-change", parent="colo-disk0", node="replication0")
        return [sorted(each["id"] for each in monitor("query-block-exports")) for monitor in (p, s)]

    def start(self) -> list[Any]:
        return [self.secondary("xen-set-replication", enable=True, primary=False),
                self.primary("xen-set-replication", enable=True, primary=True)]

    def checkpoint(self) -> list[Any]:
        return [monitor("xen-colo-do-checkpoint") for monitor in (self.primary, self.secondary)]

    def status(self) -> list[Any]:
        return [monitor("query-xen-replication-status")["error"] for monitor in (self.primary, self.secondary)]

    def failover(self) -> list[Any]:
        s = self.secondary
        answers = [s("block-export-del", id="parent0", mode="hard"),
                   s("xen-set-replication", enable=False, primary=False, failover=True)]
        deadline = time.monotonic() + 20
        while s("query-xen-replication-status")["error"] or s("query-colo-status")["reason"] == "processing":
            if time.monotonic() > deadline:
                raise TimeoutError("the failover does not end")
            time.sleep(0.005)
        return answers

    def detach(self) -> list[Any]:
        p = self.primary
        return [p("x-blockdev-change", parent="colo-disk0", child="children.1"),
                p("blockdev-del", node_name="replication0"),
                p("xen-set-replication", enable=False, primary=True)]

    def wrong(self) -> list[Any]:
        s, p = self.secondary, self.primary
        return [
            s.refuses("xen-set-replication", enable=True, primary=False),
            s.refuses("xen-set-replication", enable=True, primary=False, failover=True),
            s.refuses("blockdev-del", node_name="parent0"),
            s.refuses("blockdev-del", node_name="colo-disk0"),
            s.refuses("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": self.port}}),
            s.refuses("nbd-server-add", device="parent0"),
            s.refuses("nbd-server-remove", name="nobody"),
            s.refuses("block-export-add", type="nbd", id="view", node_name="colo-disk0", name="again"),
            p.refuses("xen-set-replication", enable=True, primary=True),
            p.refuses("x-blockdev-change", parent="colo-disk0", node="nobody"),
            p.refuses("x-blockdev-change", parent="colo-disk0", child="children.7"),
            p.refuses("x-blockdev-change", parent="primary0", node="replication0"),
            p.refuses("blockdev-add", driver="replication", mode="secondary", node_name="r", file="primary0"),
            p.refuses("blockdev-add", driver="replication", mode="primary", top_id="x", node_name="r", file="primary0"),
            p.refuses("blockdev-del", node_name="replication0"),
        ]

    def teardown(self) -> list[Any]:
        s, p = self.secondary, self.primary
        return [*(monitor("nbd-server-stop") for monitor in (p, s)),
                *(monitor("blockdev-del", node_name="colo-disk0") for monitor in (p, s)),
                s("blockdev-del", node_name="childs0"), s("blockdev-del", node_name="parent0"),
                p("blockdev-del", node_name="primary0"),
                *(monitor("query-named-block-nodes") for monitor in (p, s))]


def main() -> None:
    pair = Pair(*sys.argv[1:])
    for line in sys.stdin:
        print(line.strip(), json.dumps(getattr(pair, line.strip())(), sort_keys=True), flush=True)


if __name__ == "__main__":
    main()
