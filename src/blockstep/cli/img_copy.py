"""The commands of ``blockstep img`` for more than one image: convert, measure, dd, compare, commit and rebase."""

from __future__ import annotations

from blockstep.cli.img_options import (
    Bar,
    Cache,
    Format,
    Image,
    ImageOpts,
    Options,
    OutputFormat,
    Quiet,
    Share,
    SourceCache,
    WholeCache,
    help_on_options,
    image_format,
    option_words,
    run,
    shown,
)
from blockstep.cli.words import Argument, Option
from blockstep.errors import OptionError
from blockstep.forms import Annotated
from blockstep.streams import complain
from blockstep.units import parse_size


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
        if help_on_options(target_format, options, "-O"):
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
