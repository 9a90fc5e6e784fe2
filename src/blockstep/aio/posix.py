"""System calls on files: those that Python lacks, and whole reads and writes.

Storage that waits must not stop the event loop, and most reads and writes of a file do not wait: the page cache
has the data, or takes it. `Cached` makes the call where it ends at once and says so where it would not; the caller
then hands the request to a thread (`blockstep.aio.pool`). What the three kinds do:

    kind        read                                       write
    MEMORY      plain pread: tmpfs, memfd                   plain pwrite
    Cached      preadv(RWF_NOWAIT): the page cache or not   plain pwrite into the page cache, watched
    NEVER       always "would wait": O_DIRECT               always "would wait"

Buffered writes have no useful RWF_NOWAIT (ext4 refuses it). They are copies into the page cache, a microsecond
each, until the kernel has too many dirty pages and makes writers wait for the device. `Cached` looks at the clock:
after a write that took longer than `SLOW`, writes report "would wait" for `REST` seconds, then one is tried again.
So a device that is too slow costs the loop one wait a second, and nothing is paid while it keeps up.

Measured per 4 KiB: pread 0.3 us, preadv with RWF_NOWAIT 0.5 us, pwrite 0.35 us (tmpfs) to 1.3 us (ext4).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

from blockstep.aio import Buffer
from blockstep.errors import noting
from blockstep.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from blockstep.aio.locking import Locking

#: Copies longer than this go to a thread even if they would not wait: so many bytes take some 50 us.
INLINE: Final = 1 << 20
#: Seconds: a buffered write that took longer was made to wait.
SLOW: Final = 0.01
#: Seconds for which buffered writes then go to threads.
REST: Final = 1.0

_ZERO_RANGE, _PUNCH_HOLE, _KEEP_SIZE = 0x10, 0x02, 0x01  # <linux/falloc.h>
_IN_MEMORY: Final = {0x01021994, 0x858458F6}  # tmpfs, ramfs: <linux/magic.h>
_UNSUPPORTED: Final = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL}
_BLKGETSIZE64: Final = 0x80081272  # <linux/fs.h>
_BLKROGET: Final = 0x125E
#: Where the lock of a writer lies: a byte that no disk reaches and no other program is known to lock.
_LOCK_BYTE: Final = (1 << 62) + 0x626C6B


@cache
def _libc() -> Any:
    """The C library, loaded when it is needed: not to read a file and end."""
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


@cache
def _fallocate() -> Any:
    import ctypes

    call = getattr(_libc(), "fallocate64", None) or _libc().fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return call


# --- reads and writes that end at once, or do not happen ---


class Cached:
    """Through the page cache, without waiting for a device. See the module."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reads = True
        self._writes_wait_until = 0.0

    def read(self, fd: int, length: int, offset: int) -> Buffer:
        """``length`` bytes, or fewer if that would wait (or the file ends)."""
        if self._reads:
            buffer = bytearray(length)
            try:
                if os.preadv(fd, (buffer,), offset, os.RWF_NOWAIT) == length:
                    return buffer
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                self._reads = False  # a filesystem that cannot tell: all reads go to threads
        return b""

    def write(self, fd: int, data: Buffer, offset: int) -> int:
        """The number of bytes written; 0 if that would wait."""
        before = self._clock()
        if before < self._writes_wait_until:
            return 0
        written = os.pwrite(fd, data, offset)
        after = self._clock()
        if after - before > SLOW:
            self._writes_wait_until = after + REST
        return written


def would_wait_to_read(fd: int, length: int, offset: int) -> Buffer:
    """The read of a file that always waits."""
    return b""


def would_wait_to_write(fd: int, data: Buffer, offset: int) -> int:
    """The write of a file that always waits."""
    return 0


Reader = Callable[[int, int, int], Buffer]
Writer = Callable[[int, Buffer, int], int]


def quick_io(fd: int) -> tuple[Reader, Writer]:
    """How to read and write ``fd`` in the event loop: (read, write). Both may do less than asked; see the module."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
        return would_wait_to_read, would_wait_to_write
    if in_memory(fd):
        return os.pread, os.pwrite
    cached = Cached()
    return cached.read, cached.write


# --- whole ranges; these wait ---


class EndOfFile(OSError):
    """A file ends before what was to be read of it (EIO)."""


def read_whole(fd: int, length: int, offset: int) -> Buffer:
    """Exactly ``length`` bytes. Raises EndOfFile."""
    data, count = _read(fd, length, offset)
    if count < length:
        raise EndOfFile(errno.EIO, f"the file ends at {offset + count} bytes, before what is read")
    return data


def read_padded(fd: int, length: int, offset: int) -> Buffer:
    """Exactly ``length`` bytes; what lies beyond the end of the file reads as zeroes."""
    return _read(fd, length, offset)[0]


def _read(fd: int, length: int, offset: int) -> tuple[Buffer, int]:
    """``length`` bytes, and how many of them are the file's; the rest is zero."""
    data = os.pread(fd, length, offset)
    if len(data) == length:
        return data, length
    buffer = bytearray(length)
    done = len(data)
    buffer[:done] = data
    with memoryview(buffer) as view:
        while done < length:
            count = os.preadv(fd, (view[done:],), offset + done)
            if not count:
                break
            done += count
    return buffer, done


def write_whole(fd: int, data: Buffer, offset: int, flags: int = 0) -> None:
    """Write all of ``data``. ``flags``: os.RWF_DSYNC."""
    done = os.pwritev(fd, (data,), offset, flags)
    if done < len(data):
        with memoryview(data) as view:
            while done < len(data):
                done += os.pwritev(fd, (view[done:],), offset + done, flags)


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Give the range back to the filesystem or device; it reads as zeroes. False if that is not possible here."""
    return _allocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> bool:
    """Make the range zero and keep its space. False if that is not possible here without writing."""
    return _allocate(fd, _ZERO_RANGE | _KEEP_SIZE, offset, length)


def _allocate(fd: int, mode: int, offset: int, length: int) -> bool:
    import ctypes

    while _fallocate()(fd, mode, offset, length):
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def data_runs(fd: int, offset: int, end: int) -> Iterator[tuple[int, bool]]:
    """The range as runs of (length in bytes, whether it holds data); the rest is holes, which read as zeroes."""
    while offset < end:
        try:
            start = min(os.lseek(fd, offset, os.SEEK_DATA), end)
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: no data from here on
                yield end - offset, True
                return
            start = end
        if start > offset:
            yield start - offset, False
        if start < end:
            stop = min(os.lseek(fd, start, os.SEEK_HOLE), end)
            yield stop - start, True
            start = stop
        offset = start


# --- what kind of file it is ---


def in_memory(fd: int) -> bool:
    """Whether the file lives in memory, so that nothing waits for a device."""
    import ctypes

    buffer = ctypes.create_string_buffer(256)
    if _libc().fstatfs(fd, buffer):
        return False
    kind: int = struct.unpack_from("@l", buffer)[0]
    return kind & 0xFFFFFFFF in _IN_MEMORY


def is_block_device(fd: int) -> bool:
    """Whether it is a block device rather than a regular file."""
    return stat.S_ISBLK(os.fstat(fd).st_mode)


def length_of(fd: int) -> int:
    """The length in bytes of a regular file or block device."""
    if not is_block_device(fd):
        return os.fstat(fd).st_size
    try:
        size: int = struct.unpack("@Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0]
    except OSError:
        return os.lseek(fd, 0, os.SEEK_END)
    return size


# --- open files ---


@contextmanager
def naming(filename: str) -> Iterator[None]:
    """Give an OSError that is raised within, and names no file, the name of this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = filename
        raise


def sync_parent(path: str | os.PathLike[str]) -> None:
    """Make durable that a file has this name, or that none has it any more. Waits: for a thread. Raises OSError."""
    directory = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Put a file, which only its owner may read, in the place of the one of that name; durable at return.

    Waits: for a thread. Raises OSError that names it; then the old one may be there still.
    """
    new = f"{os.fspath(path)}.new"
    try:
        with naming(new), open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError:
        with suppress(OSError):
            os.unlink(new)
        raise
    sync_parent(path)


def set_length(fd: int, length: int, filename: str) -> None:
    """Cut a file off, or let it grow by a hole. Raises OSError that names the file and the length."""
    try:
        os.ftruncate(fd, length)
    except (OSError, OverflowError) as error:
        code = error.errno or errno.EIO if isinstance(error, OSError) else errno.EFBIG
        raise OSError(code, f"{os.strerror(code)}: it cannot have {length} bytes", filename) from None


class Fault(Record):
    """What somebody else has done to a file that is open."""

    text: str  #: which file, what happened, what to do
    lasting: bool  #: what is lost stays lost, even if the file looks right again
    torn: bool = False  #: what is in it is not what was written


class OpenFile:
    """A file that can be opened anew under the same descriptor number.

    ``fd`` stays the same number from `open` to `close`: opening anew puts another open file behind it (dup2), so
    that no request finds its descriptor closed, or worse, reused.

    A writer holds a lock (an open file description lock on one byte, ``fcntl`` F_OFD_SETLK) that keeps out other
    writers, in this process and others. Readers take none: they disturb nobody.
    """

    def __init__(self, filename: str, *, writable: bool, direct: bool = False, locking: Locking = "auto",
                 create: bool = False) -> None:
        """Raises OSError that names the file: ENOENT, EACCES, EROFS, EBUSY (locked), EINVAL (no O_DIRECT here) ..."""
        self.filename = filename
        self.locking = locking
        self.writable = writable
        self.direct = direct
        self.fd = _open_storage(filename, _flags(writable, direct) | (os.O_CREAT if create else 0))
        # Names of descriptors mean something else once these are closed; programs may leave their directory.
        self._path = None if filename.startswith(("/dev/fd/", "/proc/")) else os.path.abspath(filename)
        try:
            self._lock = self._take_lock() if writable else -1
        except BaseException as error:
            with noting(error):
                os.close(self.fd)
            raise

    def close(self) -> None:
        """Close it, and give the lock back."""
        try:
            os.close(self.fd)
        finally:
            if self._lock >= 0:
                os.close(self._lock)

    def shortened(self, length: int) -> OSError:
        """The error (EIO) of a read for which the file, once of ``length`` bytes, is too short now."""
        return OSError(errno.EIO, self._shortened(length, length_of(self.fd)))

    def _shortened(self, length: int, now: int) -> str:
        return f"{self._path or self.filename} was shortened from {length} to {now} bytes: what was there is lost"

    def fault(self, length: Callable[[], int]) -> Fault | None:
        """Whether the file, of ``length()`` bytes or more, is still what it was, and still under its name.

        May wait for the filesystem: for a thread, beside which the owner may resize the file, if its length is never
        more than the file's: lowered before that is cut, raised when it has grown. A name that cannot be looked at says
        nothing.
        """
        path, before = self._path, length()
        try:
            mine, size = os.fstat(self.fd), length_of(self.fd)
        except OSError as error:  # ESTALE, of a file that is gone from its server
            return Fault(f"{path or self.filename} cannot be looked at: {error.strerror}", False)
        is_device = stat.S_ISBLK(mine.st_mode)
        there = None
        if path is not None:
            try:
                there = os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError:
                path = None
        if size < (least := min(before, length())):
            return Fault(self._shortened(least, size), lasting=True, torn=True)
        if path is not None and not is_device and not mine.st_nlink:
            also = ", and another file put in its place" if there else ""
            return Fault(f"{path} was deleted{also}: its data end with this program; copy "
                         f"/proc/{os.getpid()}/fd/{self.fd} before that", True)
        if path is None or (there and (there.st_rdev == mine.st_rdev if is_device else os.path.samestat(there, mine))):
            return None
        if there or is_device:
            return Fault(f"{path} is not the one in use any more: put that back before this program ends", False)
        return Fault(f"{path} was moved away: put it back before this program ends", False)

    def prepare_reopen(self, writable: bool, direct: bool) -> tuple[Callable[[], None], Callable[[], None]]:
        """Open it in another way; returns (commit, abort). Nothing may be in flight at the commit."""
        lock = self._lock
        fd = _open_storage(self.filename, _flags(writable, direct))
        try:
            if not os.path.sameopenfile(fd, self.fd):
                raise OSError(errno.ESTALE, "there is another file under this name now", self.filename)
            if writable and lock < 0:
                lock = self._take_lock()
        except BaseException as error:
            with noting(error):
                os.close(fd)
            raise

        def commit() -> None:
            os.dup2(fd, self.fd, inheritable=False)
            os.close(fd)
            if not writable and self._lock >= 0:
                os.close(self._lock)
            self._lock = lock if writable else -1
            self.writable, self.direct = writable, direct

        def abort() -> None:
            os.close(fd)
            if lock != self._lock:
                os.close(lock)

        return commit, abort

    def _take_lock(self) -> int:
        """A descriptor of its own, so that the lock outlives reopening; -1 without locking."""
        if self.locking == "off":
            return -1
        fd = _open_storage(self.filename, os.O_RDWR | os.O_CLOEXEC)
        try:
            # struct flock: l_type, l_whence, l_start, l_len, l_pid, with the C compiler's padding.
            request = struct.pack("@hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, _LOCK_BYTE, 1, 0)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise OSError(errno.EBUSY, "another node or process has this file open for writing "
                                           "(locking=off lets both write)", self.filename) from None
            if self.locking == "on":
                raise OSError(error.errno, "the filesystem cannot lock this file", self.filename) from None
            return -1
        return fd


def _open_storage(filename: str, flags: int) -> int:
    """Open a regular file or a block device. An image may name a pipe: nobody waits for its other end."""
    try:
        fd = os.open(filename, flags | os.O_NONBLOCK, 0o666)
    except ValueError:  # a byte of value 0, or what no file system can write: an image may name that as well
        raise OSError(errno.EINVAL, "no file can have that name", filename) from None
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise OSError(errno.EINVAL, "neither a regular file nor a block device", filename)
        if flags & os.O_RDWR and stat.S_ISBLK(mode) and _is_read_only(fd):
            raise OSError(errno.EROFS, "the block device is read-only: open it read-only, or make it writable with "
                                       "'blockdev --setrw'", filename)
        os.set_blocking(fd, True)
    except BaseException as error:
        with noting(error):
            os.close(fd)
        raise
    return fd


def _is_read_only(fd: int) -> bool:
    """Whether writes to a block device fail: that it could be opened for them does not say."""
    return bool(struct.unpack("@i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))[0])


def _flags(writable: bool, direct: bool) -> int:
    return (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
