"""``blockstep img measure``, ``amend`` and ``dd``."""

from __future__ import annotations

from typing import Annotated

from blockstep.cli.img_options import (
    Bar,
    Cache,
    Format,
    ImageOpts,
    Options,
    OutputFormat,
    Quiet,
    Share,
    image_format,
    option_words,
    run,
    shown,
)
from blockstep.cli.words import Argument, Option
from blockstep.errors import OptionError
from blockstep.streams import complain
from blockstep.units import parse_size


def measure_command(
    filename: Annotated[str | None, Argument("[FILENAME]", help="The image that would be converted.")] = None,
    format: Format = None,
    target_format: Annotated[str, Option("-O", "--target-format", metavar="FMT", help="The new image's format: raw or "
                             "qcow2.")] = "raw",
    options: Options = None,
    size: Annotated[str | None, Option("--size", metavar="SIZE", help="The length of the disk, where there is no "
                    "image.")] = None,
    snapshot: Annotated[str | None, Option("-l", "--snapshot", metavar="SNAPSHOT", help="Of this internal snapshot.")]
        = None,
    image_opts: ImageOpts = False,
    output: OutputFormat = "human",
    share: Share = False,
) -> None:
    """How long a new image would be: with what an image holds, and with all of the disk."""
    import json

    from blockstep.images.measure import Measurement
    from blockstep.images.opened import ImageName

    source = None if filename is None else ImageName(filename, format, image_opts)
    wanted = Measurement(target_format, option_words(options), None if size is None else parse_size(size, "--size"),
                         source, snapshot)
    found = run(wanted.measure())
    print(json.dumps(found.as_json(), indent=4) if output == "json" else "\n".join(found.lines()))


def amend_command(
    filename: Annotated[str, Argument("FILENAME", help="The image.")] = "",
    options: Options = None,
    format: Annotated[str, Option("-f", "--format", metavar="FMT", help="Its format.")] = "qcow2",
    image_opts: ImageOpts = False,
    cache: Cache = "writeback",
    bar: Bar = False,
    quiet: Quiet = False,
) -> None:
    """Change options of a qcow2 image in its place. Nobody else may have it open."""
    from blockstep.images.amend import CHANGES, amend
    from blockstep.images.opened import ImageName

    if options in (["help"], ["?"]):
        print(f"Amend options for '{format}':")
        print("\n".join(f"  {name + '=<value>':<22} - {meaning}" for name, meaning in CHANGES.items()))
        return

    async def work() -> None:
        if not filename:
            raise OptionError("FILENAME", None, "given: the image to change")
        with shown("Amending", bar, quiet) as progress:
            progress(0, 1)
            await amend(ImageName(filename, image_format(format, image_opts), image_opts, cache), option_words(options))
            progress(1, 1)

    run(work())


def dd_command(
    words: Annotated[list[str], Argument("if=FILE of=FILE [bs=SIZE] [count=N] [skip=N]", help="The image, the new one, "
                     "the length of a block (512), how many blocks there are from the begin, and how many of them are "
                     "left out.")],
    format: Format = None,
    target_format: Annotated[str, Option("-O", "--target-format", metavar="FMT", help="The new image's format.")]
        = "raw",
    image_opts: ImageOpts = False,
    share: Share = False,
) -> None:
    """Copy a part of an image into a new one. count is counted from the begin, also with skip."""
    from blockstep.images.dd import dd, operands
    from blockstep.images.opened import ImageName

    async def work() -> None:
        wanted = operands(words)
        if not await dd(ImageName(wanted.source, format, image_opts), ImageName(wanted.target, target_format), wanted):
            complain(f"blockstep: {wanted.source}: cannot skip to specified offset")

    run(work())
