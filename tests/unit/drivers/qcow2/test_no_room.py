"""The file cannot grow: at any moment, for any requests, and later it can again."""

from __future__ import annotations

import errno
import os
import random
from typing import Any, ClassVar

import pytest

from blockstep.block.driver import MAY_UNMAP, Buffer, Filter
from blockstep.block.graph import Graph
from blockstep.block.node import NodeOptions, NodeRef
from blockstep.block.permissions import READ, WRITE, Role
from blockstep.block.registry import register
from blockstep.drivers.qcow2.check import check
from blockstep.testing.model import Content
from blockstep.units import KiB, MiB
from tests.scenario.qcow2 import Sparse, image_of_length
from tests.scenarios import scenario

SIZE = 2 * MiB


class RoomOptions(NodeOptions, tag="test-room"):
    file: NodeRef
    most: int


@register
class Room(Filter):
    """A file in a place with ``most`` bytes of room: blocks of 4 KiB are taken when they are first written."""

    driver: ClassVar[str] = "test-room"
    Options = RoomOptions
    options: RoomOptions
    child_roles: ClassVar[dict[str, Role]] = {"file": Role.FILTERED}

    async def open(self) -> None:
        self.most = self.options.most
        self.taken = set(range(-(-self.file.node.length // 4096)))

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        wanted = self.taken | set(range(offset // 4096, (offset + len(data) - 1) // 4096 + 1))
        if len(wanted) > len(self.taken) and len(wanted) * 4096 > self.most:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.taken = wanted
        await self.file.pwrite(offset, data)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        if flags & MAY_UNMAP:
            await self.file.write_zeroes(offset, length, flags)
        else:
            await self.pwrite(offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        self.taken -= set(range(-(-offset // 4096), (offset + length) // 4096))

    async def truncate(self, length: int) -> None:
        await self.file.resize(length)
        self.taken = {block for block in self.taken if block * 4096 < length}


async def has_room(request: Any) -> bool:
    try:
        await request
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
@pytest.mark.parametrize("seed", range(4))
@scenario
async def test_a_file_without_room_is_enospc_harms_nothing_and_goes_on_later(cluster_size: int, seed: int) -> None:
    rnd = random.Random(f"{cluster_size}-{seed}")
    image = image_of_length(SIZE, cluster_size)
    graph = Graph()
    file = await graph.open({"driver": "test-sparse", "node-name": "file", "size": len(image)})
    assert isinstance(file, Sparse)
    await file.pwrite(0, image)
    room = await graph.open({"driver": "test-room", "node-name": "room", "file": "file",
                             "most": len(image) + rnd.choice((40, 200, 500)) * KiB})
    assert isinstance(room, Room)
    node = await graph.open({"driver": "qcow2", "file": "room", "backing": None, "l2-cache-size": 1 << 18,
                             "refcount-cache-size": 1 << 18})
    user = graph.attach_backend(node, "guest", READ | WRITE)
    content = Content(bytes(SIZE))

    async def some(count: int) -> int:
        refused = 0
        for _ in range(count):
            offset, length = rnd.randrange(SIZE - 70_000), rnd.choice((1, 512, 4096, 65536))
            data = bytes(length) if rnd.random() < 0.2 else rnd.randbytes(length)
            request = user.pwrite(offset, data) if any(data) else user.write_zeroes(offset, length, MAY_UNMAP)
            if await has_room(request):
                content.write(offset, data)
            else:
                content.may_write(offset, data)
                refused += 1
            if rnd.random() < 0.2:
                refused += not await has_room(user.flush())
        got = bytes(await user.pread(0, SIZE))
        assert not (wrong := content.differs(got)), wrong
        content.adopt(got)
        return refused

    assert await some(150)
    room.most = 1 << 30
    assert not await some(30)
    await graph.detach_backend(user)
    for name in (node.name, "room", "file"):
        await graph.close(graph.find(name))
    data = file.content()
    result = check(lambda offset, length: data[offset:offset + length], len(data))
    assert result.clean, result


@pytest.mark.parametrize("cluster_size", [4096, 65536])
@scenario
async def test_an_image_that_has_filled_its_place_has_it_back_when_it_is_emptied(cluster_size: int) -> None:
    """Also the second and the third time: the tables of the next emptying have a place of their own."""
    image = image_of_length(SIZE, cluster_size)
    graph = Graph()
    file = await graph.open({"driver": "test-sparse", "node-name": "file", "size": len(image)})
    await file.pwrite(0, image)
    room = await graph.open({"driver": "test-room", "node-name": "room", "file": "file", "most": len(image) + MiB})
    assert isinstance(room, Room)
    node = await graph.open({"driver": "qcow2", "file": "room", "backing": None, "discard": "unmap"})
    user = graph.attach_backend(node, "guest", READ | WRITE)
    await node.make_empty()
    await user.flush()
    for _ in range(3):
        offset = 0
        while await has_room(user.pwrite(offset, b"!" * cluster_size)):
            offset += cluster_size
        assert offset > MiB // 2
        await node.make_empty()
        await user.flush()
        assert len(room.taken) * 4096 < len(image) + MiB // 2
        await user.pwrite(0, b"again")
    await user.flush()
    await graph.detach_backend(user)
    for name in (node.name, "room", "file"):
        await graph.close(graph.find(name))
    assert isinstance(file, Sparse)
    data = file.content()
    result = check(lambda offset, length: data[offset:offset + length], len(data))
    assert result.clean, result
