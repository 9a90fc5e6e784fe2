"""A small Linux that QEMU boots, with a disk or two: Debian's kernel for clouds, busybox, and a script.

    guest = await Guest.boot(directory, socket, "disk0", task="write")
    await guest.until(r"WROTE 3")
    guest.kill()

Everything but the disks is an initramfs in memory: busybox, the kernel's modules for virtio, and `INIT`, which does
one of three things, as the kernel's command line says (the kernel hands ``task=...`` on to it):

    task=write    write numbered files for ever, one line ``WROTE n`` for each that is on the disk
    task=check    say what is there: ``RECOVERED`` if the journal was replayed, ``FOUND n`` for files 1 to n, each whole
    anything      mount, unmount

and then ends the machine; ``FAILED ...`` is printed for whatever is not as it should be. Files are on the disk when
their line comes (the guest has synced twice: data before the name, and the name), while a second writer that never
syncs keeps the disk busy at all times. If there is a second disk, each file is written there too, when the first one
has it; it must have the files that the first has, but for the last one perhaps.

Kernel and busybox are not installed: ``tools/setup`` unpacks their packages into the environment. QEMU emulates the
processor (no KVM), which boots in a few seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import lzma
import re
import stat
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from blockstep.testing.processes import Address
from tests.peers import QMP, need, run

#: The packages, and where they may have been unpacked.
PACKAGES: Final = ("linux-image-cloud-amd64", "busybox-static")
ROOTS: Final = (Path(sys.prefix) / "guest", Path("/"))
#: The modules that a virtio disk needs, and what these need in turn is found in them.
MODULES: Final = ("virtio_pci", "virtio_blk")
#: Seconds that a line of the guest may take to come.
LIMIT: Final = 60.0

INIT: Final = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /mnt
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in $(cat /modules); do insmod "$module" || echo "FAILED insmod $module"; done
disks=
for disk in vda vdb; do
    [ -b /dev/$disk ] || break
    mkdir /mnt/$disk
    mount -t ext4 -o errors=remount-ro /dev/$disk /mnt/$disk || echo "FAILED mount $disk"
    disks="$disks $disk"
done

content() { yes "$1" | head -c 50000; }
place() { echo "/mnt/$1/$(($2 % 7))/$2"; }

write() {
    for disk in $disks; do
        while true; do dd if=/dev/zero of=/mnt/$disk/noise bs=64k count=32 2>/dev/null; rm /mnt/$disk/noise; done &
    done
    i=0
    while true; do
        i=$((i + 1))
        for disk in $disks; do
            mkdir -p "/mnt/$disk/$((i % 7))"
            content $i >/mnt/$disk/new && sync && mv /mnt/$disk/new "$(place $disk $i)" && sync ||
                { echo "FAILED write $i"; return; }
        done
        echo "WROTE $i"
    done
}

check() {
    dmesg | grep -q 'vda.*recovery complete' && echo RECOVERED
    first=
    for disk in $disks; do
        i=0
        while [ -e "$(place $disk $((i + 1)))" ]; do
            i=$((i + 1))
            [ "$(content $i | md5sum)" = "$(md5sum <"$(place $disk $i)")" ] || echo "FAILED content $i"
        done
        [ "$(find /mnt/$disk -name '[0-9]*' -type f | wc -l)" = $i ] || echo "FAILED there are more files than $i"
        first=${first:-$i}
        [ $i = $first ] || [ $i = $((first - 1)) ] || echo "FAILED $first files on the first disk, $i on the second"
        echo alive >/mnt/$disk/after && sync || echo "FAILED to write on"
    done
    echo "FOUND $first"
}

case $task in write) write ;; check) check ;; esac
for disk in $disks; do umount /mnt/$disk || echo "FAILED umount"; done
echo ENDED
reboot -f
"""


@dataclass(frozen=True)
class Parts:
    """The files that a guest is made of."""

    kernel: Path
    modules: Path
    busybox: Path


def need_guest() -> Parts:
    """The parts of a guest; the calling test is skipped where they are missing."""
    __tracebackhide__ = True
    need("qemu-system-x86_64", "mkfs.ext4")
    for root in ROOTS:
        kernels = sorted(root.glob("boot/vmlinuz-*-cloud-amd64"), reverse=True)
        for kernel, usr in itertools.product(kernels, (root, root / "usr")):
            modules, busybox = usr / "lib/modules" / kernel.name.removeprefix("vmlinuz-"), usr / "bin/busybox"
            if modules.is_dir() and busybox.exists() and _is_static(busybox.read_bytes()):
                return Parts(kernel, modules, busybox)
    return pytest.skip(f"needs {' and '.join(PACKAGES)}, unpacked in {ROOTS[0]} (make setup does it) or installed")


class Guest:
    """A running machine. Its console is its output, read line by line."""

    def __init__(self, process: asyncio.subprocess.Process, monitor: Path) -> None:
        self._process = process
        self._monitor = monitor
        self.lines: list[str] = []
        self._more = asyncio.Event()
        self._reader = asyncio.ensure_future(self._read())

    @classmethod
    async def boot(cls, directory: Path, server: Address, *exports: str, task: str) -> Guest:
        """Start a machine whose disks are NBD exports. It is not up yet: see `until`."""
        parts = need_guest()
        image, monitor = directory / "initramfs", directory / "guest.qmp"
        if not image.exists():
            image.write_bytes(initramfs(parts))
        where = (f"server.type=unix,server.path={server}" if isinstance(server, Path)
                 else f"server.type=inet,server.host={server[0]},server.port={server[1]}")
        disks = [word for export in exports for word in (
            "-blockdev", f"driver=nbd,node-name={export},export={export},{where}",
            "-device", f"virtio-blk-pci,drive={export}")]
        process = await asyncio.create_subprocess_exec(
            "qemu-system-x86_64", "-accel", "tcg", "-m", "192", "-nodefaults", "-display", "none", "-serial", "stdio",
            "-no-reboot", "-kernel", parts.kernel, "-initrd", image,
            "-append", f"console=ttyS0 quiet panic=-1 task={task}", *disks,
            "-qmp", f"unix:{monitor},server=on,wait=off",
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
        return cls(process, monitor)

    async def until(self, pattern: str) -> re.Match[str]:
        """Wait for a line that matches, also one of those that have come already. Fails if something has FAILED."""
        regex = re.compile(pattern)
        async with asyncio.timeout(LIMIT):
            while True:
                assert not [line for line in self.lines if line.startswith("FAILED")], self.console
                for line in self.lines:
                    if match := regex.fullmatch(line):
                        return match
                assert not self._reader.done(), f"the guest has ended without '{pattern}':\n{self.console}"
                self._more.clear()
                await self._more.wait()

    @property
    def written(self) -> int:
        """The number of the last file that the guest has told of."""
        return max((int(line.removeprefix("WROTE ")) for line in self.lines if line.startswith("WROTE ")), default=0)

    @property
    def console(self) -> str:
        return "\n".join(self.lines)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The machine stands still meanwhile, with no request of its disks in flight. It is up already."""
        qmp = QMP(self._monitor)
        try:
            qmp.execute("stop")
            yield
            qmp.execute("cont")
        finally:
            qmp.close()

    async def ended(self) -> int:
        """Wait until the machine has ended by itself, and return QEMU's exit code."""
        async with asyncio.timeout(LIMIT):
            await self._reader
            return await self._process.wait()

    async def kill(self) -> None:
        """SIGKILL; nothing if it has ended."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        await self._reader

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self.lines.append(line.decode(errors="replace").strip())
            self._more.set()
        self._more.set()


def make_disk(path: Path, size: int) -> Path:
    """An image with an empty ext4 in it, journal and all."""
    with open(path, "wb") as file:
        file.truncate(size)
    run("mkfs.ext4", "-q", "-F", path)
    return path


# --- the initramfs ---


def _is_static(program: bytes) -> bool:
    """Whether an ELF program (64 bits) asks for no interpreter: there are no libraries in the guest."""
    start, = struct.unpack_from("<Q", program, 32)
    size, count = struct.unpack_from("<HH", program, 54)
    return all(struct.unpack_from("<I", program, start + number * size)[0] != 3 for number in range(count))


def initramfs(parts: Parts) -> bytes:
    """A cpio archive (format "newc") of what the guest's memory holds when it starts."""
    modules = list(_with_needed(parts.modules, MODULES))
    entries = [_entry("dev", stat.S_IFDIR | 0o755), _entry("bin", stat.S_IFDIR | 0o755),
               _entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
               _entry("bin/busybox", stat.S_IFREG | 0o755, parts.busybox.read_bytes()),
               _entry("init", stat.S_IFREG | 0o755, INIT.encode())]
    entries += [_entry(name, stat.S_IFREG | 0o644, data) for name, data in modules]
    entries.append(_entry("modules", stat.S_IFREG | 0o644, "\n".join(f"/{name}" for name, _ in modules).encode()))
    return b"".join([*entries, _entry("TRAILER!!!", 0)])


def _with_needed(directory: Path, names: tuple[str, ...], seen: set[str] | None = None) -> Iterator[tuple[str, bytes]]:
    """(name, content) of modules, each after those that it needs; what the kernel has built in has no file."""
    seen = set() if seen is None else seen
    for name in names:
        plain = name.replace("-", "_")
        files = [path for path in directory.rglob("*.ko*") if path.name.split(".")[0].replace("-", "_") == plain]
        if plain in seen or not files:
            continue
        seen.add(plain)
        data = files[0].read_bytes()
        if files[0].suffix == ".xz":
            data = lzma.decompress(data)
        needed = re.search(rb"\0depends=([^\0]*)\0", data)
        yield from _with_needed(directory, tuple(needed[1].decode().split(",")) if needed else (), seen)
        yield f"{plain}.ko", data


def _entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One entry: a header of hexadecimal fields, the name, the content; each padded to four bytes."""
    raw = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(raw), 0)
    head = b"070701" + b"".join(b"%08X" % number for number in fields) + raw
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
