"""New image files: what each driver that has files needs to know to make one, and how it is made.

A driver is here with a struct of options, told apart by ``driver``, whose method `create` makes the file; it waits
for the device, so it is called in a thread. One more format is one more struct in `CreateOptions`.

An existing file is made anew: what was in it is gone. A file that somebody writes to is left alone (EBUSY); who has
nodes asks `_Create.check_unused` first, since one that is only read is not locked.
"""

from __future__ import annotations

import os
from contextlib import closing, suppress
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from blockstep.aio.posix import OpenFile, naming, set_length, write_whole
from blockstep.block.graph import Graph
from blockstep.drivers.overlay_image import OverlayImage
from blockstep.drivers.qcow2.create import new_header, write_data_file, write_image
from blockstep.drivers.qcow2.format import Header
from blockstep.errors import OptionError

_PIECE: Final = 1 << 20


class _Create(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True, tag_field="driver"):
    """What all have."""

    filename: Annotated[str, Meta(description="The file; one that exists is made anew.")]
    size: Annotated[int, Meta(description="Length of the disk in bytes.")]

    def check(self) -> None:
        """Raises OptionError for values that make no sense; before there is a job."""
        if self.size < 0:
            raise OptionError("size", self.size, "0 or more bytes")

    def files_beside(self) -> list[str]:
        """Other files that `create` makes: their paths."""
        return []

    def check_unused(self, graph: Graph, those: str = "that nodes have") -> None:
        """Raises OptionError if a node of ``graph`` has what it holds in a file that `create` would make anew.

        Looks at files, which may wait for a file system: for a thread, in a program that has other things to do.
        """
        for path in (self.filename, *self.files_beside()):
            if lies_in(graph, path):
                raise OptionError("filename" if path == self.filename else "data-file", path,
                                  f"another file than those {those}")

    def create(self, at: str | None = None) -> None:
        """Make the file; ``at``: in that place, from where it comes under its name later. Raises OSError."""
        raise NotImplementedError


class CreateFile(_Create, tag="file"):
    """A raw file."""

    preallocation: Annotated[Literal["off", "metadata", "falloc", "full"], Meta(
        description="off: a hole; falloc: with room for all of it; full: zeroes are written. metadata is refused.")
        ] = "off"
    nocow: Annotated[bool, Meta(description="Taken, and of no effect.")] = False
    extent_size_hint: Annotated[int, Meta(description="Taken, and of no effect.")] = 0

    def check(self) -> None:
        super().check()
        if self.preallocation == "metadata":
            raise OptionError("preallocation", self.preallocation, "off, falloc or full: a raw file has no metadata")

    def create(self, at: str | None = None) -> None:
        path = at or self.filename
        with naming(path), closing(OpenFile(path, writable=True, create=True)) as file:
            set_length(file.fd, 0, path)
            set_length(file.fd, self.size, path)
            if self.preallocation == "falloc" and self.size:
                os.posix_fallocate(file.fd, 0, self.size)
            elif self.preallocation == "full":
                for offset in range(0, self.size, _PIECE):
                    write_whole(file.fd, bytes(min(_PIECE, self.size - offset)), offset)
            os.fsync(file.fd)


class CreateOverlay(_Create, tag="overlay"):
    """An overlay image that holds nothing."""

    cluster_size: Annotated[int, Meta(description="Bytes, a power of two from 512 to 2 MiB.")] = 4096

    def check(self) -> None:
        super().check()
        if self.cluster_size & (self.cluster_size - 1) or not 512 <= self.cluster_size <= 2 << 20:
            raise OptionError("cluster-size", self.cluster_size, "a power of two from 512 to 2 MiB")

    def create(self, at: str | None = None) -> None:
        path = at or self.filename
        with naming(path):
            with closing(OpenFile(path, writable=True, create=True)) as file:
                os.ftruncate(file.fd, 0)
            with closing(OverlayImage(path, writable=True, locking="auto", length=self.size,
                                      cluster_size=self.cluster_size)) as image:
                os.fsync(image.fd)


class CreateQcow2(_Create, tag="qcow2"):
    """A qcow2 image."""

    version: Annotated[Literal["v2", "v3"], Meta(description="Of the format.")] = "v3"
    backing_file: Annotated[str | None, Meta(
        description="What shows through where the image holds nothing; a relative name begins at the image's "
                    "directory.")] = None
    backing_fmt: Annotated[str | None, Meta(description="The driver for the backing file.")] = None
    cluster_size: Annotated[int, Meta(description="Bytes, a power of two from 512 to 2 MiB.")] = 65536
    preallocation: Annotated[Literal["off", "metadata", "falloc", "full"], Meta(
        description="metadata: all clusters have their places; falloc: and room; full: zeroes are written.")] = "off"
    lazy_refcounts: Annotated[bool, Meta(description="Let others postpone the update of refcounts.")] = False
    refcount_bits: Annotated[int, Meta(description="Width of refcounts, a power of two up to 64.")] = 16
    compression_type: Annotated[Literal["zlib", "zstd"], Meta(description="Of clusters that are compressed.")] = "zlib"
    extended_l2: Annotated[bool, Meta(
        description="32 subclusters in each cluster, allocated one by one; of clusters of 16 KiB or more.")] = False
    data_file: Annotated[str | None, Meta(
        description="A file for the data, which is made anew; a relative name begins at the image's directory.")] = None
    data_file_raw: Annotated[bool, Meta(
        description="The data file is the disk, byte for byte, also without the image.")] = False

    def check(self) -> None:
        super().check()
        self.header()
        if self.preallocation != "off" and self.backing_file is not None:
            raise OptionError("preallocation", self.preallocation, "off with a backing file: it would be hidden")
        image = os.path.realpath(self.filename)
        if image in self.files_beside():
            raise OptionError("data-file", self.data_file, "another file than the image itself")
        if self.backing_file is not None and self._path(self.backing_file) in (image, *self.files_beside()):
            raise OptionError("backing-file", self.backing_file, "another file than the image itself, or its data file")

    def files_beside(self) -> list[str]:
        return [] if self.data_file is None else [self._path(self.data_file)]

    def _path(self, name: str) -> str:
        """Of another file, which the image calls ``name``."""
        return os.path.realpath(os.path.join(os.path.dirname(self.filename), name))

    def header(self) -> Header:
        """The header that the image gets; its tables have no places yet. Raises OptionError."""
        return new_header(self.size, version=int(self.version[1]), cluster_size=self.cluster_size,
                          refcount_bits=self.refcount_bits, lazy_refcounts=self.lazy_refcounts,
                          backing_file=self.backing_file, backing_fmt=self.backing_fmt,
                          extended_l2=self.extended_l2, data_file=self.data_file, data_file_raw=self.data_file_raw,
                          compression_type=self.compression_type)

    def create(self, at: str | None = None) -> None:
        header, path = self.header(), at or self.filename
        if self.data_file is not None:
            write_data_file(self._path(self.data_file), self.size, self.preallocation, self.data_file_raw)
        with naming(path), closing(OpenFile(path, writable=True, create=True)) as file:
            os.ftruncate(file.fd, 0)
            write_image(file.fd, header, self.preallocation)
            os.fsync(file.fd)


#: The options of all drivers that can make files.
CreateOptions = CreateFile | CreateOverlay | CreateQcow2


def lies_in(graph: Graph, filename: str) -> bool:
    """Whether a node of ``graph`` has what it holds in that file."""
    try:
        wanted = os.stat(filename)
    except FileNotFoundError:
        return False
    for node in graph.everything():
        if isinstance(place := getattr(node.options, "filename", None), str):
            with suppress(OSError):  # deleted since
                if os.path.samestat(os.stat(place), wanted):
                    return True
    return False
