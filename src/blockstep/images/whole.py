"""A qcow2 image for one who has its file for himself: checks, snapshots and bitmaps are made past the driver."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from blockstep.aio.posix import OpenFile, length_of, read_padded, write_whole
from blockstep.errors import ImageError, OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from blockstep.images.opened import ImageName


class WholeFile:
    """What the functions of `blockstep.drivers.qcow2` on whole images want. All of it waits for the device."""

    def __init__(self, file: OpenFile) -> None:
        self._fd = file.fd
        self.length = length_of(file.fd)  #: now

    def read(self, offset: int, length: int) -> bytes | bytearray | memoryview:
        """Exactly ``length`` bytes; zeroes behind the end of the file."""
        return read_padded(self._fd, length, offset)

    def write(self, offset: int, data: bytes) -> None:
        """Also behind the end of the file."""
        write_whole(self._fd, data, offset)
        self.length = max(self.length, offset + len(data))

    def sync(self) -> None:
        """Make all that was written durable."""
        os.fdatasync(self._fd)


@contextmanager
def whole_file(filename: str, writable: bool) -> Iterator[WholeFile]:
    """The file, open inside the section; a writer keeps other writers of ours out. Raises OSError that names it.

    An ImageError of the section names it afterwards, too.
    """
    file = OpenFile(filename, writable=writable)
    try:
        yield WholeFile(file)
    except ImageError as error:
        raise error.of(filename) from error
    finally:
        file.close()


async def whole_qcow2(image: ImageName) -> str:
    """The path of an image that must be a qcow2 image in a file. Raises OptionError."""
    image = image.as_file()
    if not image.is_file:
        raise OptionError("FILENAME", image.name, "a file: this is not done through nodes and networks")
    kind = await image.format_known()
    if kind != "qcow2":
        raise OptionError(image.option, kind, "qcow2: no other format has this")
    return image.name
