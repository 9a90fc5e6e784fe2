"""Whatever the bytes of an image are, a check ends with a value or an `ImageError`, and a repair with a clean image."""

from __future__ import annotations

import resource
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from blockstep.drivers.qcow2 import counts
from blockstep.drivers.qcow2.check import Checker, CheckResult, check
from blockstep.drivers.qcow2.format import parse_header
from blockstep.drivers.qcow2.repair import repair
from blockstep.errors import ImageError
from tests.peers import need
from tests.unit.drivers.qcow2.images import make, qemu_check

pytestmark = pytest.mark.interop

_KINDS = ("default", "v2-small", "512", "subclusters-16k", "refcount-8")
#: Values that are at the border of something.
_VALUES = st.sampled_from([0, 1, 2, 1 << 9, 1 << 16, 1 << 40, 1 << 55, 1 << 56, 1 << 62, 1 << 63,
                           (1 << 64) - 1, 3 << 62])


@cache
def _image(kind: str) -> bytes:
    need("qemu-img", "qemu-io")
    with TemporaryDirectory() as directory:
        return make(Path(directory) / "image", kind, "8M").read_bytes()


@cache
def _metadata(kind: str) -> list[tuple[int, int]]:
    """Where bytes matter: (begin, end) of all tables, as a check of the good image finds them."""
    data = _image(kind)
    checker = Checker(lambda offset, length: data[offset:offset + length], len(data), lambda text: None)
    checker.run()
    size = checker.header.cluster_size
    return [(first * size, min((first + count) * size, len(data))) for first, count, _ in checker._metadata]


@st.composite
def _damaged(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(_KINDS))
    data = bytearray(_image(kind))
    for _ in range(draw(st.integers(1, 6))):
        begin, end = draw(st.sampled_from(_metadata(kind)))
        at = draw(st.integers(begin, min(end, begin + draw(st.sampled_from([120, 4096, 1 << 21]))) - 1))
        at = min(at, len(data) - 1)
        match draw(st.integers(0, 5)):
            case 0:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 1:
                data[at & ~7:(at & ~7) + 8] = draw(_VALUES).to_bytes(8, "big")
            case 2:
                data[at & ~7:(at & ~7) + 8] = (draw(st.integers(0, len(data) >> 9)) << 9).to_bytes(8, "big")
            case 3:
                other, _ = draw(st.sampled_from(_metadata(kind)))
                size = draw(st.integers(1, 512))
                data[at:at + size] = data[other:other + size]
            case 4:
                data[at & ~3:(at & ~3) + 4] = draw(st.integers(0, (1 << 32) - 1)).to_bytes(4, "big")
            case _:
                if draw(st.booleans()):
                    del data[draw(st.integers(1, len(data))):]
                    break
    return bytes(data)


class _File:
    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)

    def read(self, offset: int, length: int) -> bytes:
        assert offset >= 0
        assert 0 < length <= len(self.data) - offset
        return bytes(self.data[offset:offset + length])

    def write(self, offset: int, data: bytes) -> None:
        assert offset + len(data) < 1 << 30
        if offset > len(self.data):
            self.data.extend(bytes(offset - len(self.data)))
        self.data[offset:offset + len(data)] = data

    def check(self) -> CheckResult:
        return check(self.read, len(self.data))

    def repair(self) -> CheckResult:
        return repair(self.read, len(self.data), self.write, lambda: None, "all")


@given(_damaged())
def test_any_bytes_give_a_value_or_an_error_and_are_repaired(data: bytes) -> None:
    file = _File(data)
    try:
        file.check()
        result = file.repair()
    except ImageError:
        return
    if not result.clean:
        # What no repair can help: the active L1 table is not there, or more users than a refcount can say.
        header = parse_header(bytes(file.data[:1 << 21]))
        assert header.refcount_order < 4 or header.l1_table_offset + header.l1_size * 8 > len(data) \
            or header.l1_table_offset < header.cluster_size, vars(result)
    assert vars(file.check()) == {**vars(result), "corruptions_fixed": 0, "leaks_fixed": 0}


@given(_damaged())
def test_qemu_finds_nothing_that_we_do_not(data: bytes) -> None:
    file = _File(data)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "image"
        path.write_bytes(data)
        theirs = qemu_check(path)
        try:
            ours = file.check()
        except ImageError:
            return
        if theirs is not None and (theirs.get("corruptions") or theirs["check-errors"]):
            assert ours.corruptions
        if theirs is not None and theirs.get("leaks"):
            assert not ours.clean
        if file.repair().clean:
            path.write_bytes(file.data)
            again = qemu_check(path)
            if again is not None:
                assert (again.get("corruptions", 0), again.get("leaks", 0), again["check-errors"]) == (0, 0, 0)


@given(st.binary(max_size=600))
@example(b"QFI\xfb\0\0\0\x03" + bytes(12) + b"\0\0\0\x10" + bytes(200))
def test_what_is_no_image_is_an_error(data: bytes) -> None:
    with pytest.raises(ImageError):
        _File(data).check()


def test_an_absurd_image_is_refused_in_bounded_memory() -> None:
    """A few kilobytes that claim clusters all over 2 ** 55 bytes."""
    bits, l1_size = 9, 64
    size = 1 << bits
    length = 1 << 55
    header = (b"QFI\xfb" + (2).to_bytes(4, "big") + bytes(12) + bits.to_bytes(4, "big")
              + (l1_size * 64 * size).to_bytes(8, "big") + bytes(4) + l1_size.to_bytes(4, "big")
              + (512).to_bytes(8, "big") + (1024).to_bytes(8, "big") + (1).to_bytes(4, "big") + bytes(12))
    l1 = b"".join((2048 + (index << 9)).to_bytes(8, "big") for index in range(l1_size))
    l2 = b"".join((1 << 30 | index << 31).to_bytes(8, "big") for index in range(l1_size * 64))
    data = header.ljust(512, b"\0") + l1.ljust(512, b"\0") + bytes(1024) + l2

    def read(offset: int, count: int) -> bytes:
        return data[offset:offset + count].ljust(count, b"\0")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert check(read, length).corruptions
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_more_memory_than_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An L2 table whose entries are far from each other in a sparse file of 32 PiB."""
    size = 1 << 16
    header = (b"QFI\xfb" + (2).to_bytes(4, "big") + bytes(12) + (16).to_bytes(4, "big") + (1 << 29).to_bytes(8, "big")
              + bytes(4) + (1).to_bytes(4, "big") + size.to_bytes(8, "big") + (2 * size).to_bytes(8, "big")
              + (1).to_bytes(4, "big") + bytes(12))
    l2 = b"".join((index << 40).to_bytes(8, "big") for index in range(8192))
    data = (header.ljust(size, b"\0") + (3 * size).to_bytes(8, "big")).ljust(3 * size, b"\0") + l2
    monkeypatch.setattr(counts, "MOST_MEMORY", 4 << 20)
    with pytest.raises(ImageError, match="memory"):
        check(lambda offset, length: data[offset:offset + length].ljust(length, b"\0"), 1 << 55)
