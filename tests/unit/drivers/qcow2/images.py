"""Images that qemu-img makes, in a matrix of options, and what qemu-img says of them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from blockstep.drivers.qcow2.check import CheckResult, check
from blockstep.drivers.qcow2.format import COPIED, OFFSET, Header, parse_header
from blockstep.drivers.qcow2.repair import Repair, repair
from tests.peers import run

#: Name of a kind of image -> its options.
KINDS = {
    "default": "",
    "v2": "compat=0.10",
    "v2-small": "compat=0.10,cluster_size=4096",
    "512": "cluster_size=512",
    "2M": "cluster_size=2M",
    "lazy": "lazy_refcounts=on",
    "subclusters": "extended_l2=on",
    "subclusters-16k": "extended_l2=on,cluster_size=16k",
    "zstd": "compression_type=zstd",
    "metadata": "preallocation=metadata",
    "external": "",
    "external-raw": "",
    "external-subclusters": "",
    "refcount-1": "refcount_bits=1,cluster_size=4k",
    "refcount-4": "refcount_bits=4",
    "refcount-8": "refcount_bits=8,cluster_size=4k",
    "refcount-64": "refcount_bits=64,cluster_size=512",
}


def make(path: Path, kind: str, size: str = "8M") -> Path:
    """An image of that kind with data, zeroes, holes, compressed clusters; snapshots and bitmaps where it can."""
    options = KINDS[kind]
    if kind == "external":
        options = f"data_file={path}.data"
    elif kind == "external-raw":
        options = f"data_file={path}.data,data_file_raw=on"
    elif kind == "external-subclusters":
        options = f"data_file={path}.data,extended_l2=on"
    run("qemu-img", "create", "-q", "-f", "qcow2", *(("-o", options) if options else ()), str(path), size)
    write(path, "write -P 1 0 1M", "write -P 2 3000k 70k", "write -z 512k 128k", "discard 256k 64k", "write -P 7 7M 3k",
          "write -P 5 5M 512", "write -z 6M 192k")
    if kind != "refcount-1" and not kind.startswith("external"):
        if kind not in ("2M", "metadata"):
            write(path, "write -c -P 3 4M 64k", "write -c -P 4 4160k 64k")
        run("qemu-img", "snapshot", "-c", "first", str(path))
        write(path, "write -P 9 128k 300k", "write -P 9 2M 100k")
        run("qemu-img", "snapshot", "-c", "second", str(path))
        write(path, "write -P 8 64k 100k")
    if "0.10" not in options:
        run("qemu-img", "bitmap", "--add", "-g", "65536", str(path), "b0")
        run("qemu-img", "bitmap", "--add", "--disable", "-g", "512", str(path), "b1")
        write(path, "write -P 6 1M 64k")
    return path


def write(path: Path, *commands: str) -> None:
    line = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "qcow2", *line, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def qemu_check(path: Path) -> dict[str, int | str] | None:
    """What qemu-img says; None if it does not open the image."""
    done = subprocess.run(["qemu-img", "check", "--output=json", "-f", "qcow2", str(path)],
                          capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.stdout.startswith("{") else None


def our_check(path: Path) -> CheckResult:
    with open(path, "rb") as file:
        fd = file.fileno()
        return check(lambda offset, length: os.pread(fd, length, offset), os.fstat(fd).st_size)


def our_repair(path: Path, what: Repair) -> CheckResult:
    with open(path, "r+b") as file:
        fd = file.fileno()
        return repair(lambda offset, length: os.pread(fd, length, offset), os.fstat(fd).st_size,
                      lambda offset, data: _write_whole(fd, data, offset), lambda: None, what)


def _write_whole(fd: int, data: bytes, offset: int) -> None:
    assert os.pwrite(fd, data, offset) == len(data)


class Damage:
    """An image whose tables can be changed by hand."""

    def __init__(self, path: Path, data: bytes | None = None) -> None:
        self.path, self.data = path, bytearray(path.read_bytes() if data is None else data)
        self.header: Header = parse_header(bytes(self.data[:1 << 21]))

    def u64(self, at: int) -> int:
        return int.from_bytes(self.data[at:at + 8], "big")

    def put(self, at: int, value: int, size: int = 8) -> None:
        self.data[at:at + size] = value.to_bytes(size, "big")

    @property
    def l1(self) -> int:
        """Where the entry of the first L2 table is."""
        return self.header.l1_table_offset

    @property
    def l2(self) -> int:
        return self.u64(self.l1) & OFFSET

    def entry(self, wanted: Callable[[int], bool]) -> int:
        """Where the first such entry of the first L2 table is."""
        return next(at for at in self.entries() if wanted(self.u64(at)))

    def entries(self) -> range:
        """Where the entries of the first L2 table are."""
        return range(self.l2, self.l2 + self.header.cluster_size, 16 if self.header.extended_l2 else 8)

    @property
    def exclusive(self) -> int:
        return self.entry(lambda entry: bool(entry & COPIED))

    @property
    def block(self) -> int:
        """Where the first refcount block is."""
        return self.u64(self.header.refcount_table_offset)

    def refcount(self, cluster: int, value: int) -> None:
        assert self.header.refcount_order == 4
        self.put(self.block + 2 * cluster, value, 2)

    @property
    def snapshot(self) -> int:
        return self.header.snapshots_offset

    def save(self) -> None:
        self.path.write_bytes(self.data)
