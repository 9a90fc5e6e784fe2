"""Driver ``quorum``: one disk kept on several children, each of which holds all of it.

                     write, zeroes, discard, flush                read
        quorum ──┬──► children.0        at once to all      fifo:   the first that can
                 ├──► children.1        and waits for all   quorum: all, and they vote
                 └──► children.2

A change succeeds when at least ``vote-threshold`` children did it. Those that failed are reported and stay: a child
is lost when somebody removes it. With ``read-pattern=fifo`` and ``vote-threshold=1`` this is a mirror that lives as
long as one child does, and the shape under replication: the local disk first, the link to the standby second.

**Replicas do not diverge.** Two writes to the same bytes could reach two children in different orders; so writes
that overlap take turns (`RangeLock`), and so does a voting read with the writes that it overlaps. With one child
nothing of this is needed, and nothing of it is done.

**A read never returns what a child has missed.** When a write succeeds without some child, the range is noted
(`Missed`), and until a later write makes it good reads of it go to the others: the child has no vote there either. If
no other child can serve it, the read fails with EIO: better an error than the data of yesterday. (QEMU does read the
stale child, and lets it vote.)

A flush that fails on a child is reported, and no more: nobody knows which writes since its last good flush the child
may have lost (see `blockstep.drivers.file`), and to count all of it as missed would leave the disk with one child less
to read from, or none. Who hears of it removes the child.

A discard is advice: a child that fails it is reported, and has missed nothing. When reads vote, discards are not
forwarded at all, since two children may answer a discarded range differently and both be right. Truncate is all or
nothing as far as growing goes; shrinking cannot be taken back.

Events (`Node.report`), with QEMU's names and fields: ``QUORUM_REPORT_BAD`` for each child that failed or was
outvoted, ``QUORUM_FAILURE`` when fewer than ``vote-threshold`` were good and the request failed.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, ClassVar, Literal

from blockstep.aio.inline import start_all, together
from blockstep.aio.rangelock import RangeLock
from blockstep.block.driver import FAST, Buffer, Driver, Extent
from blockstep.block.graph import Graph
from blockstep.block.node import Child, NodeOptions, NodeRef
from blockstep.block.permissions import RESIZE, WRITE, Permission, Role
from blockstep.block.registry import register
from blockstep.block.status import status_through
from blockstep.drivers.quorum_missed import Missed
from blockstep.errors import GraphError, OptionError, told

_SECTOR = 512


class QuorumOptions(NodeOptions, tag="quorum"):
    """``children``: at least one; ``vote-threshold``: how many of them make a success, 1 to all."""

    children: list[NodeRef]
    vote_threshold: int
    read_pattern: Literal["quorum", "fifo"] = "quorum"
    rewrite_corrupted: bool = False  #: a voting read writes the winner over what was outvoted
    blkverify: bool = False  #: exactly two children, any difference fails the read


@register
class Quorum(Driver):
    """See the module."""

    driver: ClassVar[str] = "quorum"
    Options = QuorumOptions
    options: QuorumOptions
    child_roles: ClassVar[dict[str, Role]] = {"children": Role.DATA}

    def __init__(self, name: str, options: NodeOptions) -> None:
        super().__init__(name, options)
        self._edges: list[Child] = []
        self._missed: dict[str, Missed] = {}
        self._lock = RangeLock()
        self._next = 0  # the number of the next child
        self._threshold = self.options.vote_threshold
        self._votes = self.options.read_pattern == "quorum"

    async def open(self) -> None:
        options, count = self.options, len(self._edges)
        if not count:
            raise OptionError("children", [], "a list of at least one node")
        if not 1 <= options.vote_threshold <= count:
            raise OptionError("vote-threshold", options.vote_threshold, f"1 to the number of children, {count}")
        if options.rewrite_corrupted and (not self._votes or options.blkverify):
            raise OptionError("rewrite-corrupted", True, "off, except with read-pattern=quorum and without blkverify")
        if options.blkverify and (count != 2 or options.vote_threshold != 2 or not self._votes):
            raise OptionError("blkverify", True, "off, except with two children, vote-threshold=2, read-pattern=quorum")
        for edge in self._edges[1:]:
            self._check_length(edge.node)
        self._next = count

    async def close(self) -> None:
        pass

    # --- children ---

    @property
    def length(self) -> int:  # type: ignore[override]
        return self._edges[0].node.length if self._edges else 0

    def attached(self, child: Child) -> None:
        self._edges = list(self.children.values())

    def detached(self, child: Child) -> None:
        self._edges = list(self.children.values())
        self._missed.pop(child.name, None)

    def child_permissions(self, child: Child, taken: Permission, shared: Permission) -> tuple[Permission, Permission]:
        taken, shared = super().child_permissions(child, taken, shared)
        if self.options.rewrite_corrupted and not self.read_only:
            taken |= WRITE
        # Writes from elsewhere are shared if the parents put up with them: below a standby's view its primary writes.
        return taken, shared & ~RESIZE

    async def add_child(self, graph: Graph, node: Driver) -> str:
        """Let ``node`` take part from now on, while requests go on. Returns the child's name, ``children.N``.

        Its content is the caller's business: it must be the others' (copied before, under drain or by a job that
        follows the writes), except that fifo reads ask it only when those before it fail.

        The name stays while the child is attached, whoever else comes and goes. N is one more than that of the
        child added last, or its own N again if that one has been removed (so that QEMU's scripts, which remove
        and add ``children.1`` in turn, find the names that they expect).

        Raises GraphError if the length differs, or if the graph refuses; then nothing changed.
        """
        async with graph.drained(self):
            self._check_length(node)
            name = f"children.{self._next}"
            with graph.change() as change:
                change.attach(self, name, Role.DATA, node)
            self._next += 1
        return name

    async def remove_child(self, graph: Graph, name: str) -> Driver:
        """Let a child go, while requests go on. Returns its node, which stays open if anybody else holds it.

        Raises GraphError if there is no such child, or if fewer than ``vote-threshold`` would be left.
        """
        async with graph.drained(self):
            edge = self._removable(name)
            with graph.change() as change:
                change.detach(edge)
            if name == f"children.{self._next - 1}":
                self._next -= 1
        await graph.close_unused(edge.node)
        return edge.node

    def _removable(self, name: str) -> Child:
        edge = self.children.get(name)
        if edge is None:
            raise GraphError(f"node '{self.name}' has no child '{name}'; it has {', '.join(self.children)}")
        if len(self._edges) <= self._threshold:
            raise GraphError(f"node '{self.name}' needs at least {self._threshold} children (vote-threshold)")
        return edge

    def _check_length(self, node: Driver) -> None:
        if node.length != self.length:
            raise GraphError(f"node '{node.name}' has {node.length} bytes, the other children of '{self.name}' "
                             f"have {self.length}")

    # --- reads ---

    async def pread(self, offset: int, length: int) -> Buffer:
        if not self._votes:
            if self._missed:
                return await self._read_first(offset, length, self._edges, [])
            edge = self._edges[0]  # the path of a view's read, spelled out
            try:
                return await edge.pread(offset, length)
            except OSError as error:
                self._bad("read", edge, offset, length, error)
                first = error
            return await self._read_first(offset, length, [other for other in self._edges if other is not edge],
                                          [first])
        if len(self._edges) == 1 and not self._missed:
            return await self._read_only_child(offset, length)
        end = offset + length
        token = self._lock.try_take(offset, end, True) or await self._lock.take(offset, end, True)
        try:
            return await self._read_and_vote(offset, length)
        finally:
            self._lock.give_back(token)

    async def _read_only_child(self, offset: int, length: int) -> Buffer:
        try:
            return await self._edges[0].pread(offset, length)
        except OSError as error:
            raise self._failure("read", offset, length, [error]) from None

    async def _read_first(self, offset: int, length: int, edges: Sequence[Child],
                          errors: list[BaseException]) -> Buffer:
        """What the first of ``edges`` has that can; ``errors`` are those of the children asked before."""
        for edge in edges:
            if self._missed and self._is_stale(edge, offset, length):
                errors.append(_has_missed(edge))
                continue
            try:
                return await edge.pread(offset, length)
            except OSError as error:
                errors.append(error)
                self._bad("read", edge, offset, length, error)
        raise self._failed(offset, length, errors)

    def _is_stale(self, edge: Child, offset: int, length: int) -> bool:
        missed = self._missed.get(edge.name)
        return missed is not None and missed.touches(offset, offset + length)

    async def _read_and_vote(self, offset: int, length: int) -> Buffer:
        edges, stale = self._edges, list[Child]()
        if self._missed:
            stale = [edge for edge in edges if self._is_stale(edge, offset, length)]
            edges = [edge for edge in edges if edge not in stale]
        results = await together([edge.pread(offset, length) for edge in edges])
        read = [(edge, data) for edge, data in zip(edges, results, strict=True) if not isinstance(data, Exception)]
        if len(read) < len(edges):
            self._report_failed("read", offset, length, edges, results)
        if len(read) < self._threshold:
            errors = [data for data in results if isinstance(data, Exception)]
            raise self._failed(offset, length, [*errors, *map(_has_missed, stale)])
        good, outvoted = self._count_votes(offset, length, read)
        if self.options.rewrite_corrupted and not self.read_only and (behind := [*outvoted, *stale]):
            results = await together([edge.pwrite(offset, good) for edge in behind])
            self._report_failed("write", offset, length, behind, results)
            self._note(offset, length, behind, results)
        return good

    def _count_votes(self, offset: int, length: int,
                     read: Sequence[tuple[Child, Buffer]]) -> tuple[Buffer, list[Child]]:
        """The content that wins, and who has another one, which is reported."""
        first = read[0][1]
        if all(data == first for _, data in read[1:]):
            return first, []
        if self.options.blkverify:
            raise self._differ(offset, length, read)
        digests = [sha256(data).digest() for _, data in read]
        winner, votes = Counter(digests).most_common(1)[0]
        if votes < self._threshold:
            raise self._failed(offset, length, [_io_error(f"only {votes} of {len(self._edges)} children agree")])
        outvoted = [edge for (edge, _), digest in zip(read, digests, strict=True) if digest != winner]
        for edge in outvoted:
            self._bad("read", edge, offset, length, None)
        return read[digests.index(winner)][1], outvoted

    def _differ(self, offset: int, length: int, read: Sequence[tuple[Child, Buffer]]) -> OSError:
        (_, one), (_, other) = read
        at = next(i for i, (a, b) in enumerate(zip(memoryview(one), memoryview(other), strict=True)) if a != b)
        return self._failed(offset, length, [_io_error(f"the children differ at {offset + at}")])

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """What the child that would serve a read knows; when reads vote, zero only where all say so.

        All of it is allocated here: what is a child's own backing file is nobody's business above.
        """
        if self._votes:
            return await self._common_status(offset, length)
        errors: list[BaseException] = []
        for edge in self._edges:
            if self._missed and self._is_stale(edge, offset, length):
                continue
            try:
                extents = await status_through(edge.node, offset, length)
            except OSError as error:
                errors.append(error)
            else:
                return [Extent(extent.length, extent.data, extent.zero) for extent in extents]
        if len(errors) == len(self._edges):
            raise self._failed(offset, length, errors)
        return [Extent(length)]

    async def _common_status(self, offset: int, length: int) -> list[Extent]:
        end = offset + length
        token = self._lock.try_take(offset, end, True) or await self._lock.take(offset, end, True)
        try:
            results = await together([status_through(edge.node, offset, length) for edge in self._edges])
        finally:
            self._lock.give_back(token)
        if any(isinstance(extents, Exception) for extents in results):
            return [Extent(length)]
        merged: list[Extent] = []
        heads = [list(reversed(extents)) for extents in results]
        while all(heads):
            step = min(stack[-1].length for stack in heads)
            current = [stack.pop() for stack in heads]
            merged.append(Extent(step, any(e.data for e in current), all(e.zero for e in current)))
            for stack, extent in zip(heads, current, strict=True):
                if extent.length > step:
                    stack.append(extent._replace(length=extent.length - step))
        return merged

    # --- changes ---

    async def pwrite(self, offset: int, data: Buffer, flags: int = 0) -> None:
        edges = self._edges
        if len(edges) == 1:
            try:
                await edges[0].pwrite(offset, data, flags)
            except OSError as error:
                raise self._failure("write", offset, len(data), [error]) from None
            if self._missed:
                self._note(offset, len(data), edges, [None])
            return
        end = offset + len(data)
        token = self._lock.try_take(offset, end) or await self._lock.take(offset, end)
        try:
            results, running = start_all([edge.pwrite(offset, data, flags) for edge in edges])
            if running is not None:
                await running.wait()
            if any(results) or self._missed:
                self._settle("write", offset, end - offset, edges, results)
                self._note(offset, end - offset, edges, results)
        finally:
            self._lock.give_back(token)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """Zeroes on all children. ``FAST`` fails only if no child is fast; else the slow ones are waited for."""
        edges = self._edges
        token = self._lock.try_take(offset, offset + length) or await self._lock.take(offset, offset + length)
        try:
            results = await together([edge.write_zeroes(offset, length, flags) for edge in edges])
            if flags & FAST:
                slow = [index for index, error in enumerate(results) if _is_not_supported(error)]
                if len(slow) == len(edges):
                    raise results[0]
                again = await together([edges[i].write_zeroes(offset, length, flags & ~FAST) for i in slow])
                for index, result in zip(slow, again, strict=True):
                    results[index] = result
            if any(results) or self._missed:
                self._settle("write", offset, length, edges, results)
                self._note(offset, length, edges, results)
        finally:
            self._lock.give_back(token)

    async def discard(self, offset: int, length: int) -> None:
        if self._votes and len(self._edges) > 1:
            return
        edges = self._edges
        token = self._lock.try_take(offset, offset + length) or await self._lock.take(offset, offset + length)
        try:
            results = await together([edge.discard(offset, length) for edge in edges])
            results = [None if _is_not_supported(error) else error for error in results]
            if any(results):
                self._settle("write", offset, length, edges, results)
        finally:
            self._lock.give_back(token)

    async def flush(self) -> None:
        edges = self._edges
        results = await together([edge.flush() for edge in edges])
        if any(results):
            self._settle("flush", 0, 0, edges, results)

    async def truncate(self, length: int) -> None:
        """All children or none: those that have grown are cut again if another could not; shrinking has no way back."""
        before, edges, wrong = self.length, self._edges, list[str]()
        token = await self._lock.take(0, max(before, length))
        try:
            results = await together([edge.resize(length) for edge in edges])
            errors = [error for error in results if error is not None]
            if errors and length > before:
                grown = [edge for edge, error in zip(edges, results, strict=True) if error is None]
                kept = await together([edge.resize(before) for edge in grown])
                wrong = [f"'{edge.node.name}' could not be cut again: {told(error)}"
                         for edge, error in zip(grown, kept, strict=True) if error is not None]
        finally:
            self._lock.give_back(token)
        if errors:
            first = _most_common(errors)
            for each in wrong:
                first.add_note(each)
            raise first

    def _settle(self, operation: str, offset: int, length: int, edges: list[Child], results: list[Any]) -> None:
        """After a change: report those that failed, and raise if they are too many."""
        self._report_failed(operation, offset, length, edges, results)
        errors = [error for error in results if error is not None]
        if len(edges) - len(errors) < self._threshold:
            raise self._failed(offset, length, errors)

    def _note(self, offset: int, length: int, edges: list[Child], results: list[Any]) -> None:
        """After a write that has succeeded: who has missed it, and for whom it makes the range good."""
        for edge, error in zip(edges, results, strict=True):
            if error is not None:
                self._missed.setdefault(edge.name, Missed()).add(offset, offset + length)
            elif edge.name in self._missed:
                self._missed[edge.name].made_good(offset, offset + length)
                if not self._missed[edge.name].ranges:
                    del self._missed[edge.name]

    # --- reports ---

    def _report_failed(
        self, operation: str, offset: int, length: int, edges: Sequence[Child], results: Sequence[Any]
    ) -> None:
        for edge, result in zip(edges, results, strict=True):
            if isinstance(result, OSError):
                self._bad(operation, edge, offset, length, result)
            elif isinstance(result, Exception):
                raise result  # not an I/O error: a bug, which must not be outvoted

    def _bad(self, operation: str, edge: Child, offset: int, length: int, error: OSError | None) -> None:
        data: dict[str, Any] = {"type": operation, "node-name": edge.node.name, **_sectors(offset, length)}
        if error is not None:
            data["error"] = os.strerror(error.errno) if error.errno else str(error)
        self.report("QUORUM_REPORT_BAD", data)

    def _failure(self, operation: str, offset: int, length: int, errors: list[OSError]) -> OSError:
        """The only child failed."""
        self._bad(operation, self._edges[0], offset, length, errors[0])
        return self._failed(offset, length, errors)

    def _failed(self, offset: int, length: int, errors: Sequence[BaseException]) -> OSError:
        """Too few were good: tell the listeners; returns the error that most of them met."""
        self.report("QUORUM_FAILURE", {"reference": self.name, **_sectors(offset, length)})
        return _most_common(errors)


def _most_common(errors: Sequence[BaseException]) -> OSError:
    met = [error for error in errors if isinstance(error, OSError)]
    code = Counter(error.errno for error in met).most_common(1)[0][0]
    return next(error for error in met if error.errno == code)


def _is_not_supported(error: object) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP)


def _has_missed(edge: Child) -> OSError:
    return _io_error(f"'{edge.node.name}' has missed a write there")


def _io_error(reason: str) -> OSError:
    return OSError(errno.EIO, f"{os.strerror(errno.EIO)}: {reason}")


def _sectors(offset: int, length: int) -> dict[str, int]:
    first = offset // _SECTOR
    return {"sector-num": first, "sectors-count": -(-(offset + length) // _SECTOR) - first}
