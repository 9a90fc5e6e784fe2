"""New images: the options of qemu-img's ``-o`` to what the driver that makes the file wants."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from blockstep.aio.pool import in_thread
from blockstep.block.graph import Graph
from blockstep.drivers.create import CreateOptions
from blockstep.errors import OptionError
from blockstep.images import FORMATS, is_options
from blockstep.images.files import made_anew
from blockstep.images.opened import ImageName, opened
from blockstep.keyval import fit

#: What qemu-img calls ``version``, and its values.
COMPAT: Final = {"0.10": "v2", "v2": "v2", "1.1": "v3", "v3": "v3"}
#: A qcow2 image is a multiple of this: QEMU does not see what is beyond the last one.
SECTOR: Final = 512
#: How it shows them.
_SHOWN: Final = {"v2": "0.10", "v3": "1.1"}


def creators() -> dict[str, type[msgspec.Struct]]:
    """Format -> the options with which its files are made."""
    kinds = {str(kind.__struct_config__.tag): kind for kind in CreateOptions.__args__}
    drivers = {name: "file" if name == "raw" else name for name in FORMATS}
    return {name: kinds[driver] for name, driver in drivers.items() if driver in kinds}


class Creation(msgspec.Struct, frozen=True):
    """What the user said of a new image. ``options``: words, as from ``-o``. ``backing`` is relative to the image.
    ``option`` is how its format is given, for errors."""

    format: str
    filename: str
    size: int | None = None
    options: Mapping[str, str] = msgspec.field(default_factory=dict)
    backing: str | None = None
    backing_format: str | None = None
    unsafe: bool = False
    option: str = "-f"

    async def checked(self) -> Any:
        """The struct of `blockstep.drivers.create` for it; the backing image is looked at for its size.

        Raises OptionError naming ``option``, ``-b``, ``-F`` or the option of ``-o``, and OSError.
        """
        kinds = creators()
        if self.format not in kinds:
            raise OptionError(self.option, self.format, "one of " + ", ".join(kinds))
        kind = kinds[self.format]
        given = dict(self._fields(_known(kind)))
        if self.size is not None:
            given["size"] = str(self.size)
        backing = given.get("backing-file")
        if backing is not None and "backing-fmt" not in given:
            raise OptionError("-F", None, f"given: the format of the backing image '{backing}'")
        if backing is not None and (not self.unsafe or "size" not in given):
            path = backing if is_options(backing) else os.path.join(os.path.dirname(self.filename), backing)
            graph = Graph()
            async with opened(ImageName(path, given["backing-fmt"], option="-F"), graph=graph) as image:
                given.setdefault("size", str(image.length))
                return self._wanted(kind, given, graph)
        if "size" not in given:
            raise OptionError("size", None, f"given: '{self.filename}' has no backing image to take it from")
        return self._wanted(kind, given, Graph())

    def _wanted(self, kind: type[msgspec.Struct], given: dict[str, str], below: Graph) -> Any:
        """``below``: has the backing image, which is not to be made anew."""
        words = {"driver": str(kind.__struct_config__.tag), "filename": self.filename, **given}
        try:
            wanted: Any = fit(words, kind, "-o", words=True)
            wanted.check()
            wanted.check_unused(below, "of the backing image")
        except OptionError as error:
            raise OptionError(self._option(error.option.rpartition(" ")[2]), error.value, error.expected) from None
        if self.format == "qcow2":
            wanted = msgspec.structs.replace(wanted, size=-(-wanted.size // SECTOR) * SECTOR)
        return wanted

    def _option(self, field: str) -> str:
        """How the user gave a field."""
        if field == "filename":
            return "FILENAME"
        given = {"size": ("size", self.size), "backing-file": ("-b", self.backing),
                 "backing-fmt": ("-F", self.backing_format)}.get(field)
        return given[0] if given and given[1] is not None else f"-o {_word(field)}"

    def _fields(self, known: set[str]) -> Iterator[tuple[str, str]]:
        words = dict(self.options)
        for option, word, value in (("-b", "backing_file", self.backing), ("-F", "backing_fmt", self.backing_format)):
            if value is None:
                continue
            if word.replace("_", "-") not in known:
                raise OptionError(option, value, f"left out: {self.format} images have no backing image")
            words[word] = value
        for word, value in words.items():
            name = "version" if word == "compat" else word.replace("_", "-")
            if name not in known:
                shown = ", ".join(sorted(_word(one) for one in known))
                raise OptionError("-o", word, f"an option of {self.format} images: {shown}")
            if word == "compat":
                if value not in COMPAT:
                    raise OptionError("-o compat", value, "0.10 (v2) or 1.1 (v3)")
                value = COMPAT[value]
            yield name, value


async def create(wanted: Any) -> None:
    """Make the file; what was under its name stays until it is complete. Raises OSError that names it."""
    async with made_anew(wanted.filename, beside=wanted.files_beside()) as path:
        await in_thread(wanted.create, path)


def formatting(format: str, wanted: Any) -> str:
    """The line that qemu-img prints: what is made. Of qcow2 images it has the defaults as well."""
    default = type(wanted)(filename="", size=0)
    found: dict[str, Any] = {"extended_l2": False} if format == "qcow2" else {}
    for one in msgspec.structs.fields(wanted):
        value, word = getattr(wanted, one.name), _word(one.encode_name)
        always = word == "size" or (format == "qcow2" and word in _ALWAYS)
        if word != "filename" and (always or value != getattr(default, one.name)):
            found[word] = _SHOWN.get(value, value) if isinstance(value, str) else value
    first = _ORDER if format == "qcow2" else ("size",)
    order = sorted(found, key=lambda word: first.index(word) if word in first else len(first))
    values = {True: "on", False: "off"}
    return " ".join([f"Formatting '{wanted.filename}', fmt={format}", *(
        f"{word}={values[found[word]] if isinstance(found[word], bool) else found[word]}" for word in order)])


#: The order in which qemu-img tells them of a qcow2 image.
_ORDER: Final = ("cluster_size", "extended_l2", "preallocation", "compression_type", "size", "backing_file",
                 "backing_fmt", "compat", "data_file", "data_file_raw", "lazy_refcounts", "refcount_bits")
_ALWAYS: Final = {"cluster_size", "compression_type", "lazy_refcounts", "refcount_bits"}


def option_help(format: str) -> Iterator[str]:
    """The options of a format, one a line."""
    kind = creators()[format]
    for one in msgspec.structs.fields(kind):
        if one.encode_name not in _OWN:
            meaning = getattr(msgspec.inspect.type_info(one.type), "extra_json_schema", None) or {}
            yield f"  {_word(one.encode_name) + '=<value>':<22} - {meaning.get('description', '')}".rstrip(" -")


_OWN: Final = {"filename", "file"}


def _known(kind: type[msgspec.Struct]) -> set[str]:
    return {one.encode_name for one in msgspec.structs.fields(kind)} - _OWN


def _word(field: str) -> str:
    return "compat" if field == "version" else field.replace("-", "_")
