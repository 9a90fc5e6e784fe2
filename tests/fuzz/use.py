"""What is done with a broken image: all that a user can do with one, each to a value or an error of ours.

Errors are OSError and BlockstepError. Everything else is a *finding*: another exception, more than the memory or the
processor's time that a case has, and the strong one: an image in which the check finds nothing wrong reads, after
writes, what was written, and the check finds nothing wrong still.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from blockstep.block.bitmap import DirtyBitmap
from blockstep.block.driver import FUA, MAY_UNMAP, Driver
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.permissions import READ, RESIZE, WRITE
from blockstep.drivers.qcow2.check import CheckResult
from blockstep.errors import BlockstepError
from blockstep.images.bitmap import BitmapAction, change_bitmap
from blockstep.images.check import check_image
from blockstep.images.describe import as_text, described
from blockstep.images.mapping import map_image
from blockstep.images.opened import ImageName, opened
from blockstep.images.snapshot import change_snapshots, snapshots_of
from blockstep.units import GiB, KiB, MiB

#: Bytes of a disk that are read and compared.
LOOKED_AT = 12 * MiB


class Finding(AssertionError):
    """What must not be."""


class Case:
    """One broken image in a file of its own. ``step`` is what is being done to it."""

    def __init__(self, path: Path, rnd: random.Random) -> None:
        self.path, self.rnd, self.step = path, rnd, ""
        self.name = ImageName(str(path), "qcow2", cache="unsafe")

    async def run(self) -> int:
        """Do everything. Returns how many steps ended with a value. Raises what is a finding."""
        good = 0
        for step in (self.info, self.map, self.snapshots, self.read, self.check, self.write, self.repair, self.inside,
                     self.write):
            self.step = step.__name__
            good += await self._survives(step)
        return good

    @staticmethod
    async def _survives(step: Callable[[], Awaitable[object]]) -> bool:
        try:
            await step()
        except Finding:
            raise
        except (OSError, BlockstepError) as error:
            if not str(error):
                raise Finding("an error without words") from error
            return False
        return True

    # --- looking ---

    async def info(self) -> None:
        for fields in await described(self.name, chain=True):
            as_text(fields)

    async def map(self) -> None:
        async with opened(self.name) as image:
            count = 0
            async for _ in map_image(image, 0, 64 * GiB):
                count += 1
                if count > 5000:
                    break

    async def snapshots(self) -> None:
        await snapshots_of(self.name)

    async def read(self) -> None:
        async with opened(self.name) as image:
            await self._content(image)
            if image.length:
                for _ in range(5):
                    offset = self.rnd.randrange(image.length)
                    await self._survives(lambda offset=offset: image.pread(  # type: ignore[misc]
                        offset, min(4096, image.length - offset)))

    async def _content(self, image: Backend) -> bytes | None:
        """The beginning of the disk; None if not all of it can be read."""
        whole = True
        pieces = []
        for offset in range(0, min(image.length, LOOKED_AT), 256 * KiB):
            length = min(256 * KiB, image.length - offset)
            try:
                pieces.append(bytes(await image.pread(offset, length)))
            except OSError:
                whole = False
        return b"".join(pieces) if whole else None

    async def check(self) -> CheckResult:
        return await check_image(self.name, None, lambda text: None)

    async def _wrong(self) -> list[str]:
        """What a check finds that is worse than a leak.

        If two entries share a cluster, as no program makes them, and one goes, the other lacks the mark of exclusive
        use: that costs a copy, and is not counted.
        """
        found: list[str] = []
        await check_image(self.name, None, found.append)
        return [text for text in found
                if not text.startswith("leak") and not text.endswith("does not fit to the refcount 1")]

    async def _sound(self) -> bool:
        try:
            return not (await self.check()).corruptions
        except (OSError, BlockstepError):
            return False

    # --- changing ---

    async def write(self) -> None:
        """Requests of a guest; in an image that is sound, they do what they should."""
        sound = await self._sound()
        graph = Graph()
        node = await graph.open({
            "driver": "qcow2", "node-name": "disk", "discard": "unmap", "l2-cache-size": 1 << 23,
            "file": {"driver": "file", "filename": str(self.path)}, "cache": {"no-flush": True}})
        failed = False
        try:
            user = graph.attach_backend(node, "guest", READ | WRITE | RESIZE)
            try:
                model = await self._content(user)
                content = None if model is None else bytearray(model)
                for _ in range(self.rnd.choice((3, 12))):
                    failed |= not await self._survives(lambda: self._request(user, content))
                after = await self._content(user)
                if sound and not failed and content is not None and after != content:
                    raise Finding("a sound image reads other bytes than were written")
            finally:
                await graph.detach_backend(user)
        finally:
            await graph.close(node)
        if sound and not failed and (wrong := await self._wrong()):
            raise Finding(f"after writes a sound image has: {wrong[:3]}")

    async def _request(self, user: Backend, content: bytearray | None) -> None:
        rnd = self.rnd
        what = rnd.choice(("write", "write", "write", "zero", "discard", "flush", "empty", "truncate", "bitmap"))
        end = min(user.length, LOOKED_AT)
        if what == "flush" or not end:
            await user.flush()
            return
        offset = rnd.randrange(end) & rnd.choice((-1, -4096, -65536))
        length = min(rnd.choice((1, 512, 4096, 65536, 200_000, 2 * MiB)), end - offset)
        if what == "bitmap":
            await self._bitmap(user.node)
        elif what == "write":
            data = rnd.randbytes(min(length, 4096)) * -(-length // 4096)
            await user.pwrite(offset, data[:length], rnd.choice((0, FUA)))
            self._expect(content, offset, data[:length])
        elif what == "zero":
            await user.write_zeroes(offset, length, rnd.choice((0, MAY_UNMAP)))
            self._expect(content, offset, bytes(length))
        elif what == "discard":
            await user.discard(offset, length)
            if content is not None:
                self._expect(content, offset, bytes(await user.pread(offset, length)))
        elif what == "empty":
            if rnd.random() < 0.3 and not user.node.children.get("backing"):
                await user.node.make_empty()
                self._expect(content, 0, bytes(len(content or b"")))
        elif rnd.random() < 0.3 and user.length < 1 << 40:
            before = user.length
            await user.truncate(max(1, before + rnd.choice((-70_000, -1, 1, 70_000, 5 * MiB))))
            if content is not None:
                grown = min(user.length, LOOKED_AT) - len(content)
                content.extend(bytes(max(0, grown)))
                del content[user.length:]

    async def _bitmap(self, node: Driver) -> None:
        if node.bitmaps and self.rnd.random() < 0.5:
            node.bitmaps[self.rnd.choice(list(node.bitmaps))].prepare_remove().commit()
        else:
            DirtyBitmap.prepare_add(node, f"new{self.rnd.randrange(9)}", persistent=True).commit()
        await node.keep_bitmaps()

    @staticmethod
    def _expect(content: bytearray | None, offset: int, data: bytes) -> None:
        if content is not None:
            content[offset:offset + len(data)] = data

    async def repair(self) -> None:
        """A copy is repaired of leaks; the image of everything."""
        before = self.path.read_bytes() if self.path.stat().st_size < 64 * MiB else None
        await self._survives(lambda: check_image(self.name, "leaks", lambda text: None))
        if before is not None:
            self.path.write_bytes(before)
        await check_image(self.name, "all", lambda text: None)

    async def inside(self) -> None:
        """Snapshots and bitmaps, which begin with a check."""
        names: list[Any] = []
        try:
            names = [one["id"] for one in await snapshots_of(self.name)]
        except (OSError, BlockstepError):
            pass
        rnd = self.rnd
        change: tuple[Callable[[], Awaitable[object]], ...] = (
            lambda: change_snapshots(self.name, "create", "new"),
            lambda: change_snapshots(self.name, "apply", rnd.choice(names or ["1"])),
            lambda: change_snapshots(self.name, "delete", rnd.choice(names or ["1"])),
            lambda: change_bitmap(self.name, "b2", [BitmapAction("add")]),
            lambda: change_bitmap(self.name, "b0", [BitmapAction("merge", "b1")]),
            lambda: change_bitmap(self.name, "b1", [BitmapAction("remove")]))
        sound = await self._sound()
        done = await self._survives(rnd.choice(change))
        if sound and done and (wrong := await self._wrong()):
            raise Finding(f"after a change of snapshots or bitmaps a sound image has: {wrong[:3]}")


def use(path: Path, rnd: random.Random) -> int:
    """Do everything with the image at ``path``. Returns how many steps ended with a value; raises findings."""
    case = Case(path, rnd)
    try:
        return asyncio.run(case.run())
    except BaseException as error:
        error.add_note(f"in the step '{case.step}'")
        raise
