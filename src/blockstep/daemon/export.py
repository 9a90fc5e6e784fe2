"""``blockstep export``: one image, raw or of another format, over NBD; what qemu-nbd does for one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from blockstep.block.graph import Graph
from blockstep.block.permissions import NONE, READ, WRITE
from blockstep.daemon.disks import serve, uris
from blockstep.daemon.files import Files
from blockstep.daemon.service import Service
from blockstep.errors import OptionError
from blockstep.images.opened import ImageName
from blockstep.inventory.event_lines import tell
from blockstep.nbd.export import Export
from blockstep.nbd.server import Server
from blockstep.nbd.tls import server_context
from blockstep.nbd.uri import Address
from blockstep.streams import complain


class ExportConfig(msgspec.Struct, frozen=True):
    """What ``blockstep export`` was told. ``given``: the user said where to listen."""

    path: Path
    name: str
    address: Address
    format: str = "raw"
    read_only: bool = False
    direct: bool = False
    discard: Literal["unmap", "ignore"] = "unmap"
    tls: Literal["off", "optional", "required"] = "off"
    tls_certificates: Path | None = None
    tls_verify_peer: bool = False
    max_connections: int = 0
    given: bool = True


async def main(config: ExportConfig, ready: Callable[[list[str]], None]) -> None:
    """Serve until SIGTERM or SIGINT; then finish what is in flight, flush, and close the image in good order.

    ``ready`` gets the URIs once clients can connect. Raises OptionError or OSError if it cannot serve.
    """
    tls = None
    if config.tls != "off":
        if config.tls_certificates is None:
            raise OptionError("--tls-certificates", None, f"given with --tls {config.tls}")
        tls = server_context(config.tls_certificates, config.tls_verify_peer, option="--tls-certificates")
    service = Service(None)
    graph = Graph()
    graph.listeners.append(tell)
    image = ImageName(os.path.abspath(config.path), config.format, cache="none" if config.direct else "writeback",
                      option="--format")
    options = await image.node_options(writable=not config.read_only)
    node = await graph.open({**options, "node-name": "disk", "discard": config.discard})
    backend = graph.attach_backend(node, "export", READ | (NONE if config.read_only else WRITE))
    files = Files(lambda: _tell_faults(files))
    files.watch("disk", node)
    server = Server(tls=config.tls, tls_context=tls, max_connections=config.max_connections)
    try:
        server.add(Export(config.name, backend))
        addresses = await serve(server, config.address, config.given)
        ready(uris(addresses, [config.name], tls=config.tls == "required"))
        await service.wait()
    finally:
        await server.stop()
        await files.close()
        try:
            if not config.read_only:
                await backend.flush()
        finally:
            await graph.detach_backend(backend)
            await graph.close(node)


def _tell_faults(files: Files) -> None:
    for fault in files.faults.values():
        complain(f"blockstep: {fault}")
