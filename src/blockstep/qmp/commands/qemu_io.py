"""The commands of qemu-io, on a node: what tests and people use to look at a disk and to scribble on it.

    write -P 0x41 0 64k          "wrote 65536/65536 bytes at offset 0" and how long it took
    read -P 0x41 0 64k           complains if something else is there
    write -z 0 1M                zeroes; -u: may be holes; -n: only if that is fast
    discard, flush, length, truncate, alloc, map

Those that only make sense for a program of their own (open, close, aio_*, sleep, ...) are not here. A command that
fails says so in its output, as in qemu-io; nothing is raised.

Source: the man page of qemu-io and the output of qemu-io 7.2.
"""

from __future__ import annotations

import getopt
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

import msgspec

from blockstep.block.driver import FAST, FUA, MAY_UNMAP, Buffer, Driver
from blockstep.block.graph import Graph
from blockstep.block.io import Backend
from blockstep.block.permissions import READ, WRITE, Permission
from blockstep.block.resize import resize
from blockstep.errors import BlockstepError, OptionError
from blockstep.units import parse_size

#: What a write writes when nobody says what, and no more than this at a time.
_FILLING: Final = 0xCD
_MOST: Final = 0x7FFFFE00


class _Complaint(Exception):
    """The command makes no sense; the text says why."""


class _Command(msgspec.Struct, frozen=True):
    run: Callable[[_Call], Awaitable[str]]
    usage: str
    options: str
    least: int
    most: int | None  #: words, options included
    permission: Permission
    doc: str
    exact: bool = False  #: as many words as ``least`` after the options


class _Call:
    """One command line, taken apart."""

    def __init__(self, name: str, words: list[str]) -> None:
        found = _COMMANDS.get(_ALIASES.get(name, name))
        if found is None:
            raise _Complaint(f'command "{name}" not found')
        self.name, self.command = _ALIASES.get(name, name), found
        self.usage = f"{self.name} {found.usage} -- {found.doc}"
        count = len(words)
        if count < found.least or (found.most is not None and count > found.most):
            wanted = f"at least {found.least}" if found.most is None else f"between {found.least} and {found.most}"
            wanted = str(found.least) if found.least == found.most else wanted
            raise _Complaint(f"bad argument count {count} to {self.name}, expected {wanted} arguments")
        try:
            options, self.words = getopt.getopt(words, found.options)
        except getopt.GetoptError as error:
            problem = "option requires an argument" if "requires" in error.msg else "invalid option"
            raise _Complaint(f"{self.name}: {problem} -- '{error.opt}'\n{self.usage}") from None
        if len(self.words) < found.least or (found.exact and len(self.words) > found.least):
            raise _Complaint(self.usage)
        self.options = dict(options)
        self.graph: Graph
        self.backend: Backend
        self.began = time.perf_counter()

    def __contains__(self, option: str) -> bool:
        return option in self.options

    @property
    def offset(self) -> int:
        return number(self.words[0])

    @property
    def length(self) -> int:
        text = self.words[1]
        length = number(text)
        if length > _MOST and "-n" not in self:
            raise _Complaint(f"length cannot exceed {_MOST} without -n, given {text}")
        return length

    @property
    def lengths(self) -> list[int]:
        """Of the pieces of a vector."""
        found = [number(word) for word in self.words[1:]]
        for text, length in zip(self.words[1:], found, strict=True):
            if length > _MOST:
                raise _Complaint(f"Argument '{text}' exceeds maximum size {_MOST}")
        if sum(found) > _MOST:
            raise _Complaint(f"The total number of bytes exceed the maximum size {_MOST}")
        return found

    @property
    def pattern(self) -> int | None:
        text = self.options.get("-P")
        if text is None:
            return None
        try:
            value = int(text, 0)
        except ValueError:
            value = -1
        if not 0 <= value <= 255:
            raise _Complaint(f"{text} is not a valid pattern byte")
        return value

    def inside(self, offset: int, length: int) -> None:
        """qemu-io calls what lies outside an I/O error."""
        if offset + length > self.backend.length:
            raise OSError(5, os.strerror(5))

    def report(self, what: str, offset: int, count: int, operations: int = 1) -> str:
        """The two lines about how it went; none with -q, another with -C."""
        if "-q" in self:
            return ""
        seconds = max(time.perf_counter() - self.began, 1e-9)
        if "-C" in self:
            return (f"{count},{operations},{clock(seconds)},{count / seconds:.3f},{operations / seconds:.3f}\n")
        return (f"{what} {count}/{count} bytes at offset {offset}\n"
                f"{size(count)}, {operations} ops; {clock(seconds, long=True)} "
                f"({size(count / seconds)}/sec and {operations / seconds:.4f} ops/sec)\n")


async def qemu_io(graph: Graph, node: Driver, line: str) -> str:
    """Run one command on ``node`` and return what qemu-io would print. Errors are part of that."""
    words = line.split()
    if not words:
        return ""
    if words[0] in ("help", "?"):
        return _help(words[1:])
    try:
        call = _Call(words[0], words[1:])
        backend = graph.attach_backend(node, "qemu-io", call.command.permission)
    except (_Complaint, BlockstepError) as error:
        return f"{error}\n"
    call.graph, call.backend = graph, backend
    try:
        return await call.command.run(call)
    except (_Complaint, BlockstepError) as error:
        return f"{error}\n"
    except OSError as error:
        return f"{call.name.removesuffix('v')} failed: {os.strerror(error.errno or 5)}\n"
    finally:
        await graph.detach_backend(backend)


# --- the commands ---


async def _read(call: _Call) -> str:
    offset, length, pattern = call.offset, call.length, call.pattern
    start, count = number(call.options.get("-s", "0")), number(call.options.get("-l", "0"))
    if pattern is None and ("-s" in call or "-l" in call):
        raise _Complaint(call.usage)
    count = count or length - start
    if start + count > length or count < 0:
        raise _Complaint("pattern verification range exceeds end of read data")
    return await _read_and_show(call, offset, [length], pattern, start, count)


async def _readv(call: _Call) -> str:
    lengths = call.lengths
    return await _read_and_show(call, call.offset, lengths, call.pattern, 0, sum(lengths))


async def _read_and_show(call: _Call, offset: int, lengths: list[int], pattern: int | None, start: int,
                         count: int) -> str:
    if "-b" in call:
        raise OSError(95, os.strerror(95))
    length = sum(lengths)
    call.inside(offset, length)
    data = await call.backend.pread(offset, length)
    text = ""
    if pattern is not None and data[start:start + count] != bytes([pattern]) * count:
        text = f"Pattern verification failed at offset {offset + start}, {count} bytes\n"
    if "-v" in call and "-q" not in call:
        text += "".join(_dump(data, offset))
    return text + call.report("read", offset, length)


async def _write(call: _Call) -> str:
    zeroes, pattern = "-z" in call, call.pattern
    for other, refused in (("-P", zeroes), ("-s", zeroes or pattern is not None)):
        if refused and other in call:
            raise _Complaint("Only one of -z, -P, and -s can be specified at the same time")
    for option in ("-n", "-u"):
        if option in call and not zeroes:
            raise _Complaint(f"{option} requires -z to be specified")
    if "-s" in call:
        raise _Complaint("-s is not available here: the file would be one of the daemon's host")
    offset, length = call.offset, call.length
    if "-b" in call or "-c" in call:
        raise OSError(95, os.strerror(95))
    call.inside(offset, length)
    flags = FUA if "-f" in call else 0
    if zeroes:
        flags |= (MAY_UNMAP if "-u" in call else 0) | (FAST if "-n" in call else 0)
        await call.backend.write_zeroes(offset, length, flags)
    else:
        await call.backend.pwrite(offset, bytes([_FILLING if pattern is None else pattern]) * length, flags)
    return call.report("wrote", offset, length)


async def _writev(call: _Call) -> str:
    offset, length = call.offset, sum(call.lengths)
    call.inside(offset, length)
    filling = _FILLING if call.pattern is None else call.pattern
    await call.backend.pwrite(offset, bytes([filling]) * length, FUA if "-f" in call else 0)
    return call.report("wrote", offset, length)


async def _flush(call: _Call) -> str:
    await call.backend.flush()
    return ""


async def _discard(call: _Call) -> str:
    offset, length = call.offset, call.length
    call.inside(offset, length)
    await call.backend.discard(offset, length)
    return call.report("discard", offset, length)


async def _length(call: _Call) -> str:
    return f"{size(call.backend.length)}\n"


async def _truncate(call: _Call) -> str:
    await resize(call.graph, call.backend.node, call.offset)
    return ""


async def _alloc(call: _Call) -> str:
    offset = call.offset
    length = number(call.words[1]) if len(call.words) > 1 else 512
    call.inside(offset, length)
    held = sum(extent.length for extent in await call.backend.block_status(offset, length) if extent.depth == 1)
    return f"{held}/{length} bytes allocated at offset {size(offset)}\n"


async def _map(call: _Call) -> str:
    runs: list[tuple[int, bool]] = []
    for extent in await call.backend.block_status(0, call.backend.length):
        held = extent.depth == 1
        if runs and runs[-1][1] == held:
            runs[-1] = runs[-1][0] + extent.length, held
        else:
            runs.append((extent.length, held))
    text, offset = "", 0
    for length, held in runs:
        text += (f"{size(length)} ({length:#x}) bytes {'    allocated' if held else 'not allocated'} "
                 f"at offset {size(offset)} ({offset:#x})\n")
        offset += length
    return text


# --- words ---


def number(text: str) -> int:
    """A number of bytes: decimal, with a suffix, or hexadecimal."""
    try:
        return int(text, 16) if text.lower().startswith("0x") else parse_size(text)
    except (ValueError, OptionError):
        raise _Complaint(f"Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}") from None


def size(value: float) -> str:
    """``100 bytes``, ``8 KiB``, ``1.500 KiB``."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = min(max(int(value).bit_length() - 1, 0) // 10, len(units) - 1)
    scaled = value / (1 << 10 * power)
    return f"{scaled:.0f} {units[power]}" if scaled == int(scaled) else f"{scaled:.3f} {units[power]}"


def clock(seconds: float, long: bool = False) -> str:
    """``0:00:01.25``, or as people read it: ``01.25 sec``."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    if long and not hours and not minutes:
        return f"{rest:05.2f} sec"
    return f"{hours}:{minutes:02d}:{rest:05.2f}"


def _dump(data: Buffer, offset: int) -> Iterator[str]:
    for start in range(0, len(data), 16):
        row = bytes(data[start:start + 16])
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        yield f"{offset + start:08x}:  {' '.join(f'{byte:02x}' for byte in row)}  {text}\n"


def _help(names: list[str]) -> str:
    wanted = [_ALIASES.get(name, name) for name in names] or sorted(_COMMANDS)
    return "".join(f"{name} {_COMMANDS[name].usage} -- {_COMMANDS[name].doc}\n" if name in _COMMANDS
                   else f"command {name} not found\n" for name in wanted)


_ALIASES: Final = {"r": "read", "rv": "readv", "w": "write", "wv": "writev", "f": "flush", "d": "discard",
                   "l": "length", "t": "truncate"}

_COMMANDS: Final[dict[str, _Command]] = {
    "read": _Command(_read, "[-bCqv] [-P pattern [-s off] [-l len]] off len", "bCl:pP:qs:v", 2, None, READ,
                     "read bytes from an offset on", exact=True),
    "readv": _Command(_readv, "[-Cqv] [-P pattern] off len [len..]", "CP:qv", 2, None, READ,
                      "read several pieces from an offset on"),
    "write": _Command(_write, "[-bcCfnquz] [-P pattern] off len", "bcCfnpP:qs:uz", 2, None, READ | WRITE,
                      "write bytes from an offset on", exact=True),
    "writev": _Command(_writev, "[-Cfq] [-P pattern] off len [len..]", "CfqP:", 2, None, READ | WRITE,
                       "write several pieces from an offset on"),
    "flush": _Command(_flush, "", "", 0, 0, READ | WRITE, "make durable what was written"),
    "discard": _Command(_discard, "[-Cq] off len", "Cq", 2, None, READ | WRITE,
                        "the range is not needed any more", exact=True),
    "length": _Command(_length, "", "", 0, 0, READ, "the length of the disk"),
    "truncate": _Command(_truncate, "off", "", 1, 1, READ | WRITE, "change the length of the disk"),
    "alloc": _Command(_alloc, "offset [count]", "", 1, 2, READ, "how much of a range the top layer holds"),
    "map": _Command(_map, "", "", 0, 0, READ, "which ranges the top layer holds"),
}
