"""``blockstep img``: make, look at, compare, copy and change image files, with the options of qemu-img.

The words that are printed, the JSON and the exit codes are qemu-img's as well. The work is `blockstep.images`; here
are the options, and what is printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final, Literal

from blockstep.cli.img_inside import bitmap_command, snapshot_command
from blockstep.cli.img_more import amend_command, dd_command, measure_command
from blockstep.cli.img_options import (
    Bar,
    Cache,
    Failed,
    Format,
    Image,
    ImageOpts,
    Options,
    OutputFormat,
    Quiet,
    Share,
    SourceCache,
    WholeCache,
    image_format,
    option_words,
    run,
    shown,
)
from blockstep.cli.words import Argument, Command, Option, parsed, typer_app
from blockstep.errors import BlockstepError, OptionError, told
from blockstep.images import AUTO
from blockstep.streams import complain
from blockstep.units import parse_size

if TYPE_CHECKING:
    import typer

    from blockstep.drivers.qcow2.check import CheckResult

HELP: Final = "Make, look at, compare, copy and change image files, with qemu-img's options and exit codes."

def _help_on_options(format: str, options: list[str] | None, option: str) -> bool:
    """Whether ``-o help`` was given; then it is printed. ``option``: how the format was given, for errors."""
    if options != ["help"] and options != ["?"]:
        return False
    from blockstep.images.create import creators, option_help

    if format not in creators():
        raise OptionError(option, format, "one of " + ", ".join(creators()))
    print(f"Supported {format} options:")
    print("\n".join(option_help(format)))
    return True


def create_command(
    filename: Annotated[str, Argument(metavar="FILENAME", help="The image.")] = "",
    size: Annotated[str | None, Argument(metavar="[SIZE]", help="Its length; default: the backing image's.")]
        = None,
    format: Annotated[str, Option("-f", "--format", metavar="FMT", help="The format.")] = "raw",
    backing: Annotated[str | None, Option("-b", "--backing", metavar="FILE", help="The image that shows through; "
                       "relative to the new one.")] = None,
    backing_format: Annotated[str | None, Option("-F", "--backing-format", metavar="FMT",
                              help="Its format; needed with -b.")] = None,
    unsafe: Annotated[bool, Option("-u", help="Do not look at the backing image.")] = False,
    options: Options = None,
    quiet: Quiet = False,
) -> None:
    """Make a new image. A file that is there is replaced."""
    from blockstep.images.create import Creation, create, formatting

    async def work() -> None:
        if _help_on_options(format, options, "-f"):
            return
        if not filename:
            raise OptionError("FILENAME", None, "given: the image to make")
        wanted = await Creation(format, filename, None if size is None else parse_size(size), option_words(options),
                                backing, backing_format, unsafe).checked()
        if not quiet:
            print(formatting(format, wanted), flush=True)
        await create(wanted)

    run(work())


def info_command(
    filename: Image,
    format: Annotated[str, Option("-f", "--format", metavar="FMT", help="Its format. auto: what its content "
                                        "looks like; nothing but info looks without being asked.")] = AUTO,
    image_opts: ImageOpts = False,
    backing_chain: Annotated[bool, Option("--backing-chain", help="And all images below.")] = False,
    output: OutputFormat = "human",
    share: Share = False,
) -> None:
    """What an image is: format, sizes, backing image, snapshots, bitmaps."""
    import json

    from blockstep.images.describe import as_text, described
    from blockstep.images.opened import ImageName

    chain = run(described(ImageName(filename, format, image_opts), backing_chain))
    if output == "json":
        print(json.dumps(chain if backing_chain else chain[0], indent=4))
    else:
        print("\n\n".join(as_text(one) for one in chain))


def check_command(
    filename: Image,
    format: Annotated[str, Option("-f", "--format", metavar="FMT", help="Its format.")] = "qcow2",
    image_opts: ImageOpts = False,
    cache: WholeCache = "writeback",
    repair: Annotated[Literal["leaks", "all"] | None, Option("-r", "--repair", metavar="leaks|all",
                      help="Give leaked clusters back; or repair everything, at the risk of a wrong choice.")] = None,
    output: OutputFormat = "human",
    quiet: Quiet = False,
    share: Share = False,
) -> int:
    """Whether an image is consistent. Exit code: 0 yes, 2 corruptions, 3 only leaks, 63 its format has no checks."""
    from blockstep.images import check as checks

    async def fixed() -> CheckResult:
        from blockstep.images.opened import ImageName

        image = ImageName(filename, image_format(format, image_opts), image_opts)
        try:
            return await checks.check_image(image, repair, complain)
        except checks.NothingToCheck as error:
            complain(f"blockstep: {told(error)}")
            raise Failed(checks.NO_CHECKS) from None

    try:
        # To look only, nothing is needed of what images are opened with otherwise: that takes longer than most checks.
        simple = repair is None and format == "qcow2" and not image_opts
        result = checks.look(filename, complain) if simple else run(fixed())
    except (BlockstepError, OSError) as error:
        complain(f"blockstep: {told(error)}")
        return 1
    if output == "json":
        import json

        print(json.dumps(result.as_json(filename), indent=4))
    elif not quiet:
        print("\n".join(checks.lines(result)))
    return checks.exit_code(result)


def map_command(
    filename: Image,
    format: Format = None,
    image_opts: ImageOpts = False,
    start: Annotated[str, Option("--start-offset", "-s", metavar="SIZE", help="Where to begin.")] = "0",
    length: Annotated[str | None, Option("--max-length", "-l", metavar="SIZE", help="Stop after so many bytes.")]
        = None,
    output: OutputFormat = "human",
    share: Share = False,
) -> None:
    """Which image of the chain holds which bytes, and where in its file."""
    import json

    from blockstep.images.mapping import map_image
    from blockstep.images.opened import ImageName, opened

    async def work() -> None:
        begin = parse_size(start, "--start-offset")
        count = None if length is None else parse_size(length, "--max-length")
        line = "["
        async with opened(ImageName(filename, format, image_opts)) as image:
            if output == "human":
                print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
            async for entry in map_image(image, begin, count):
                if output == "json":
                    fields = json.dumps(entry.as_json())
                    print(f"{line}{{ {fields[1:-1]}}}", end="")
                    line = ",\n"
                elif entry.data and not entry.zero:
                    if entry.offset is None:
                        complain("blockstep: the image has external, encrypted or compressed clusters: --output json "
                                 "can show them")
                        raise Failed(1)
                    print(f"{_hex(entry.start):<16}{_hex(entry.length):<16}{_hex(entry.offset):<16}{entry.filename}")
        if output == "json":
            print("]" if line != "[" else "[]")

    run(work())


def _hex(value: int) -> str:
    return f"{value:#x}" if value else "0"


def compare_command(
    filename1: Annotated[str, Argument(metavar="FILENAME1", help="One image.")],
    filename2: Annotated[str, Argument(metavar="FILENAME2", help="The other.")],
    format1: Annotated[str | None, Option("-f", "--format", metavar="FMT", help="The one's format: raw, qcow2, "
                       "overlay; auto.")] = None,
    format2: Annotated[str | None, Option("-F", "--second-format", metavar="FMT", help="The other's.")]
        = None,
    image_opts: ImageOpts = False,
    strict: Annotated[bool, Option("-s", "--strict", help="Their lengths and block status must be equal, too.")]
        = False,
    cache: SourceCache = "writeback",
    bar: Bar = False,
    quiet: Quiet = False,
    share: Share = False,
) -> int:
    """Whether two images read the same. Exit code: 0 yes, 1 no, 2 it could not be found out."""
    from blockstep.images.compare import compare
    from blockstep.images.opened import ImageName, opened

    async def work() -> int:
        async with (opened(ImageName(filename1, format1, image_opts, cache)) as one,
                    opened(ImageName(filename2, format2, image_opts, cache, option="-F")) as two):
            with shown("Comparing", bar, quiet) as progress:
                result = await compare(one, two, strict, progress)
        if not quiet:
            print("\n".join(result.lines()))
        return 0 if result.identical else 1

    return run(work(), error_code=2)


def convert_command(
    filenames: Annotated[list[str] | None, Argument(metavar="FILENAME... TARGET", help="The images, which are "
                         "put one behind the other, and the new image.")] = None,
    format: Format = None,
    target_format: Annotated[str, Option("-O", "--target-format", metavar="FMT", help="The new image's format.")]
        = "raw",
    image_opts: ImageOpts = False,
    target_image_opts: Annotated[bool, Option("--target-image-opts", help="The target is the options of a node; "
                                 "needs -n.")] = False,
    options: Options = None,
    no_create: Annotated[bool, Option("-n", "--no-create", help="Write into a target that exists.")] = False,
    target_is_zero: Annotated[bool, Option("--target-is-zero", help="With -n: the target reads as zeroes.")]
        = False,
    compressed: Annotated[bool, Option("-c", "--compress", help="Compress what is written: qcow2.")] = False,
    backing: Annotated[str | None, Option("-B", "-b", "--backing", metavar="FILE", help="The image that shows through "
                       "in the target, with the content of the source's own one: only what the source holds above it "
                       "is written.")] = None,
    backing_format: Annotated[str | None, Option("-F", "--backing-format", metavar="FMT", help="Its format.")] = None,
    snapshot: Annotated[str | None, Option("-l", "--snapshot", metavar="SNAPSHOT", help="Copy this internal snapshot, "
                        "by id or name, or as snapshot.id=ID or snapshot.name=NAME.")] = None,
    salvage: Annotated[bool, Option("--salvage", help="What cannot be read becomes zeroes, with a warning.")] = False,
    bitmaps: Annotated[bool, Option("--bitmaps", help="Copy persistent bitmaps as well: qcow2 to qcow2.")]
        = False,
    skip_broken_bitmaps: Annotated[bool, Option("--skip-broken-bitmaps", help="With --bitmaps: leave out those that "
                                   "are inconsistent.")] = False,
    offload: Annotated[bool, Option("-C", "--copy-range-offloading", help="Let the kernel copy between raw "
                       "files, which may share their blocks; zeroes are not looked for.")] = False,
    sparse: Annotated[str, Option("-S", "--sparse-size", metavar="SIZE", help="So many zeroes become a hole; "
                      "0: none do.")] = "4k",
    cache: Cache = "writeback",
    source_cache: SourceCache = "writeback",
    rate: Annotated[str | None, Option("-r", "--rate-limit", metavar="SIZE", help="Bytes a second.")] = None,
    workers: Annotated[int, Option("-m", "--parallel", metavar="N", help="Requests at a time, 1 to 16.")] = 8,
    out_of_order: Annotated[bool, Option("-W", "--oob", help="Taken, and of no effect: with -m 1 the target is "
                            "written in order, else nearly so.")] = False,
    bar: Bar = False,
    quiet: Quiet = False,
    share: Share = False,
) -> None:
    """Copy images into a new one, of any format.

    The new image is there when it is complete and durable; until then its name is free, or is the old file's.
    """
    from blockstep.images.convert import Conversion, convert
    from blockstep.images.opened import ImageName

    def unreadable(offset: int, error: OSError) -> None:
        if not quiet:
            complain(f"blockstep: warning: error while reading offset {offset}: {error.strerror}")

    def skipped(bitmap: str) -> None:
        complain(f"blockstep: warning: Skipping inconsistent bitmap '{bitmap}'")

    async def work() -> None:
        if _help_on_options(target_format, options, "-O"):
            return
        if filenames is None or len(filenames) < 2:
            raise OptionError("TARGET", None, "given, after the images that are copied")
        if target_image_opts and not no_create:
            raise OptionError("--target-image-opts", True, "given with -n")
        sources = tuple(ImageName(name, format, image_opts, source_cache) for name in filenames[:-1])
        target = ImageName(filenames[-1], image_format(target_format, target_image_opts), target_image_opts, cache,
                           option="-O")
        conversion = Conversion(
            sources, target, create=not no_create, options=option_words(options), zeroed=target_is_zero,
            sparse=parse_size(sparse, "-S"), offload=offload, workers=workers,
            rate=0 if rate is None else parse_size(rate, "-r"), bitmaps=bitmaps,
            skip_bitmap=skipped if skip_broken_bitmaps else None, compressed=compressed,
            backing=backing, backing_format=backing_format, salvage=unreadable if salvage else None,
            snapshot=snapshot)
        with shown("Converting", bar, quiet) as progress:
            await convert(conversion, progress)

    run(work())


def resize_command(
    filename: Image,
    size: Annotated[str, Argument(metavar="[+|-]SIZE", help="The new length, or how much more or less.")],
    format: Format = None,
    image_opts: ImageOpts = False,
    shrink: Annotated[bool, Option("--shrink", help="Needed to make it smaller: what is beyond the end is lost.")]
        = False,
    preallocation: Annotated[Literal["off", "metadata", "falloc", "full"], Option(help="Of what is added.")]
        = "off",
    quiet: Quiet = False,
) -> None:
    """Give an image another length. What is added reads as zeroes."""
    from blockstep.aio.posix import naming
    from blockstep.images.opened import ImageName, opened
    from blockstep.images.resize import resize, wanted_size

    async def work() -> None:
        async with opened(ImageName(filename, format, image_opts), writable=True) as image:
            with naming(filename):
                await resize(image, wanted_size(size, image.length), shrink, preallocation)
        if not quiet:
            print("Image resized.")

    run(work())


def commit_command(
    filename: Image,
    format: Annotated[str, Option("-f", "--format", metavar="FMT", help="Its format.")] = "qcow2",
    image_opts: ImageOpts = False,
    base: Annotated[str | None, Option("-b", "--base", metavar="FILE", help="Merge down to this backing image; "
                    "the images above it are left as they are.")] = None,
    keep: Annotated[bool, Option("-d", "--drop", help="Do not empty the image afterwards.")] = False,
    cache: Cache = "writeback",
    rate: Annotated[str | None, Option("-r", "--rate-limit", metavar="SIZE", help="Bytes a second.")] = None,
    bar: Bar = False,
    quiet: Quiet = False,
) -> None:
    """Merge an image into its backing image, and empty it."""
    from blockstep.images.commit import commit
    from blockstep.images.opened import ImageName

    async def work() -> None:
        image = ImageName(filename, image_format(format, image_opts), image_opts, cache)
        with shown("Committing", bar, quiet) as progress:
            await commit(image, base, keep, 0 if rate is None else parse_size(rate, "-r"), progress)
        if not quiet:
            print("Image committed.")

    run(work())


def rebase_command(
    filename: Image,
    backing: Annotated[str | None, Option("-b", "--backing", metavar="FILE", help="The new backing image, "
                       "relative to the image; an empty name: none.")] = None,
    backing_format: Annotated[str | None, Option("-F", "--backing-format", metavar="FMT", help="Its format.")]
        = None,
    format: Annotated[str, Option("-f", "--format", metavar="FMT", help="The image's format.")] = "qcow2",
    image_opts: ImageOpts = False,
    unsafe: Annotated[bool, Option("-u", help="Change only the name: the new backing image has the content of "
                      "the old one.")] = False,
    cache: Cache = "writeback",
    source_cache: WholeCache = "writeback",
    bar: Bar = False,
    quiet: Quiet = False,
    share: Share = False,
) -> None:
    """Give an image another backing image. It reads as before: what differs is copied into it first."""
    from blockstep.images.opened import ImageName
    from blockstep.images.rebase import rebase

    async def work() -> None:
        if backing is None and not unsafe:
            raise OptionError("-b", None, "given: the new backing image, or an empty name for none")
        with shown("Rebasing", bar, quiet) as progress:
            await rebase(ImageName(filename, image_format(format, image_opts), image_opts, cache), backing or "",
                         backing_format, unsafe, progress)

    run(work())


COMMANDS: Final[dict[str, Command]] = {
    "create": create_command,
    "info": info_command,
    "check": check_command,
    "map": map_command,
    "compare": compare_command,
    "convert": convert_command,
    "resize": resize_command,
    "commit": commit_command,
    "rebase": rebase_command,
    "snapshot": snapshot_command,
    "bitmap": bitmap_command,
    "measure": measure_command,
    "amend": amend_command,
    "dd": dd_command,
}
#: Of these a word that begins with a dash may be an argument: a length, to make an image so much smaller.
_DASHED: Final = ("resize",)


def make_app() -> typer.Typer:
    """The commands for typer."""
    return typer_app("img", HELP, COMMANDS, _DASHED)


def main(words: Sequence[str]) -> int | None:
    """Carry out a command line that needs no explanation. None: typer has to look at it. Errors are as typer's."""
    command = COMMANDS.get(words[0]) if words else None
    given = parsed(command, words[1:], words[0] in _DASHED) if command else None
    return None if command is None or given is None else command(**given) or 0
