"""The programs of others that tests talk to: whether they are here, and how they are started.

    pytestmark = pytest.mark.interop

    def test_fio_verifies_what_it_wrote(tmp_path):
        need("fio")                                  # skips, and says which Debian package would help
        with nbdkit(tmp_path, "memory", "64M") as uri:
            run("fio", f"--uri={uri}", ...)

A peer listens on a unix socket in the test's own directory, so that tests never meet. `blockstep.testing.processes`
has what is below: `started`, `run`, `QMP`; it is all to be had from here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockstep.testing import processes
from blockstep.testing.processes import QMP, ProcessFailed, blockstep, monitored, run, started, stop, unix_uri

__all__ = ["PACKAGES", "QMP", "ProcessFailed", "blockstep", "missed", "monitored", "nbdkit", "nbdsh",
           "need", "qemu_nbd", "qemu_system", "run", "started", "stop", "unix_uri"]

#: Program -> the Debian package that has it.
PACKAGES = {
    "fio": "fio",
    "mkfs.ext4": "e2fsprogs",
    "nbdcopy": "libnbd-bin",
    "nbdinfo": "libnbd-bin",
    "nbdkit": "nbdkit",
    "nbdsh": "python3-libnbd",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-storage-daemon": "qemu-system-common",
    "qemu-system-x86_64": "qemu-system-x86",
}

#: What was missed in this session: package -> number of tests skipped for it. Printed by conftest.
missed: dict[str, int] = {}


def need(*programs: str) -> None:
    """Skip the calling test (or module, when called at its top) unless all ``programs`` are installed."""
    __tracebackhide__ = True  # so that the summary names the test, and not this line
    absent = [name for name in programs if shutil.which(name) is None]
    if absent:
        packages = sorted({PACKAGES.get(name, name) for name in absent})
        for package in packages:
            missed[package] = missed.get(package, 0) + 1
        pytest.skip(f"needs {', '.join(absent)} (Debian: {' '.join(packages)})", allow_module_level=True)


def nbdsh(script: str) -> str:
    """Run ``script`` in nbdsh (libnbd's Python shell, with its handle ``h``) and return what it printed."""
    need("nbdsh")
    # It starts the first python3 of the path, which has to be Debian's: libnbd's module is nowhere else.
    return run("env", "PATH=/usr/bin:/bin", "nbdsh", "-c", script).stdout


@contextmanager
def nbdkit(directory: Path, *arguments: str | Path, name: str = "nbdkit") -> Iterator[str]:
    """nbdkit with ``arguments`` (plugin and its parameters, or options before them). Yields the URI."""
    need("nbdkit")
    path = directory / f"{name}.sock"
    with started(["nbdkit", "--foreground", "--exit-with-parent", f"--unix={path}", *arguments], path):
        yield unix_uri(path)


@contextmanager
def qemu_nbd(directory: Path, image: str | Path, *options: str, image_format: str = "raw", export: str = "",
             name: str = "qemu-nbd") -> Iterator[str]:
    """qemu-nbd serving ``image`` to any number of clients. Yields the URI."""
    need("qemu-nbd")
    path = directory / f"{name}.sock"
    command: list[str | Path] = ["qemu-nbd", "--persistent", "--shared=0", f"--socket={path}",
                                 f"--format={image_format}", f"--export-name={export}", *options, image]
    with started(command, path):
        yield unix_uri(path, export)


@contextmanager
def qemu_system(directory: Path, *arguments: str | Path, name: str = "qemu") -> Iterator[QMP]:
    """QEMU's block layer without a guest (``-machine none``). Yields its QMP connection."""
    need("qemu-system-x86_64")
    with processes.qemu_system(directory, *arguments, name=name) as (qmp, _):
        yield qmp
