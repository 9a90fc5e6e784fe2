"""The instruments: fio, a client that notes how long each write took, resident memory, the page cache."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import random
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockstep.testing.processes import Address, connect, run
from blockstep.units import KiB, MiB


@dataclass(frozen=True)
class Workload:
    """What fio does: ``rw`` as fio names it, blocks of ``block`` bytes, ``depth`` requests at a time."""

    rw: str
    block: int
    depth: int

    def __str__(self) -> str:
        size = f"{self.block // MiB} MiB" if self.block >= MiB else f"{self.block // KiB}k"
        return f"{size} {self.rw} depth {self.depth}"


def fio(uri: str, work: Workload, size: int, seconds: float = 0, *more: str, once: bool = False) -> float:
    """Requests per second of one run of fio's NBD engine over the first ``size`` bytes.

    With ``seconds`` it runs so long, going round; ``once``: or until each block has had its turn, if that comes
    first. Without ``seconds``, until it has done ``size`` bytes once.
    """
    words = ["fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", f"--rw={work.rw}", f"--bs={work.block}",
             f"--iodepth={work.depth}", f"--size={size}", "--output-format=json", *more]
    if seconds:
        words += [f"--runtime={seconds}"] if once else ["--time_based", f"--runtime={seconds}"]
    printed = run(*words, timeout=seconds + 300).stdout
    job = json.loads(printed[printed.index("{"):])["jobs"][0]
    if job["error"]:
        raise OSError(job["error"], f"fio on {uri}: {os.strerror(job['error'])}")
    return float(job["read" if "read" in work.rw else "write"]["iops"])


class Prober:
    """A blocking NBD client of its own that does one thing: write a block and wait for the reply.

    Newstyle handshake with NBD_OPT_EXPORT_NAME and simple replies: the oldest words of the protocol, which every
    server speaks. Raises OSError for whatever goes wrong.
    """

    def __init__(self, address: Address, export: str = "", timeout: float = 30.0) -> None:
        self._socket = connect(address, timeout)
        try:
            if self._take(16) != b"NBDMAGICIHAVEOPT":
                raise OSError("not a newstyle NBD server")
            self._take(2)
            name = export.encode()
            self._socket.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(name)) + name)
            self.size = struct.unpack(">QH", self._take(10))[0]
        except BaseException:
            self._socket.close()
            raise

    def write(self, offset: int, data: bytes) -> None:
        """Write ``data`` at ``offset`` and wait until the server says that it is done."""
        self._socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, 0, offset, len(data)) + data)
        magic, code, _ = struct.unpack(">IIQ", self._take(16))
        if magic != 0x67446698:
            raise OSError(f"not a simple reply: {magic:#x}")
        if code:
            raise OSError(code, os.strerror(code))

    def close(self) -> None:
        """Hang up, without a word."""
        self._socket.close()

    def _take(self, count: int) -> bytes:
        taken = b""
        while len(taken) < count:
            piece = self._socket.recv(count - len(taken))
            if not piece:
                raise OSError("the server hung up")
            taken += piece
        return taken


class WriteLog:
    """Writes 4 KiB blocks one after the other in a thread, and notes when each began and ended.

    `longest(since)` is the longest time, in seconds, in which no write was done. What else the machine does is in it:
    `usual()` says how long a write takes at other times. `held()` is a guest that its manager has stopped.
    """

    def __init__(self, address: Address, export: str, span: int) -> None:
        self._prober = Prober(address, export)
        self._span = span
        self._times: list[tuple[float, float]] = []
        self._error: OSError | None = None
        self._stop = threading.Event()
        self._first = threading.Event()
        self._turn = threading.Lock()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> WriteLog:
        self._thread.start()
        if not self._first.wait(30):
            self._stop.set()
            raise TimeoutError("a hundred writes were not done within 30 s")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._prober.close()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        data, offset = os.urandom(4096), 0
        try:
            while not self._stop.is_set():
                with self._turn:
                    begin = time.perf_counter()
                    self._prober.write(offset, data)
                    self._times.append((begin, time.perf_counter()))
                offset = (offset + 8 * 4096) % self._span
                if len(self._times) > 100:
                    self._first.set()
        except OSError as error:
            self._error = error
        finally:
            self._first.set()

    def some_more(self) -> None:
        """Return when a few more writes are done (or the log has ended)."""
        goal = len(self._times) + 20
        until(lambda: len(self._times) >= goal or not self._thread.is_alive(), 30, "writes go on")

    def longest(self, since: float) -> float:
        """Seconds between two writes that were done, the second after ``since``. Call it after the block."""
        ends = [end for _, end in self._times]
        return max((after - before for before, after in itertools.pairwise(ends) if after >= since), default=0.0)

    @contextmanager
    def held(self, hold: bool = True) -> Iterator[None]:
        """No write is in flight inside the block (if ``hold``)."""
        if not hold:
            yield
            return
        with self._turn:
            yield

    def usual(self) -> float:
        """Seconds of the median write."""
        times = sorted(end - begin for begin, end in self._times)
        return times[len(times) // 2] if times else 0.0


def until(condition: Callable[[], bool], limit: float, what: str, every: float = 0.002) -> None:
    """Ask ``condition`` ``every`` so many seconds until it holds. Raises TimeoutError after ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not after {limit:g} s")
        time.sleep(every)


def resident(process: subprocess.Popen[Any]) -> int:
    """Bytes of a process that are in memory now."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * KiB
    raise ProcessLookupError(process.pid)


def fetch_memory(size: int) -> None:
    """Touch ``size`` bytes of memory and give them back, so that what is measured next finds them in this machine.

    A virtual machine gives memory that nobody uses back to its host; fetching it takes longer than a copy into it.
    At most half of what is free, so that nobody is killed for it.
    """
    size = min(size, os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE // 2)
    mmap.mmap(-1, max(size, mmap.PAGESIZE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


def make_disk(path: Path, size: int) -> Path:
    """A disk full of data, the same in each call; one that is there already is left as it is.

    Data and not merely allocated blocks: those read as holes, which servers find out in very different times and
    then do not send.
    """
    return path if path.exists() else make_sparse(path, size, [(0, size)])


def make_sparse(path: Path, size: int, data: Iterable[tuple[int, int]] = ()) -> Path:
    """A disk of holes, with data in the (offset, length) stretches of ``data``: the same in each call."""
    block = random.Random(0).randbytes(MiB)
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in data:
            file.seek(offset)
            for _ in range(length // MiB):
                file.write(block)
    return path


def forget(path: Path) -> None:
    """Drop a file from the page cache, so that the next read of it reaches the storage below."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def file_system(path: Path) -> str:
    """The type of the file system that ``path`` is on."""
    return run("stat", "--file-system", "--format=%T", path).stdout.strip()
