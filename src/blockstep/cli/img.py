"""``blockstep img``: make, look at, compare, copy and change image files, with the options of qemu-img.

The words that are printed, the JSON and the exit codes are qemu-img's as well. The work is `blockstep.images`; here
are the options, and what is printed; of the commands for two images and more in `blockstep.cli.img_copy`.
"""

from __future__ import annotations

from collections.abc import Sequence

from blockstep.cli.img_copy import (
    commit_command,
    compare_command,
    convert_command,
    dd_command,
    measure_command,
    rebase_command,
)
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
    WholeCache,
    help_on_options,
    image_format,
    option_words,
    run,
    shown,
)
from blockstep.cli.img_snapshots_bitmaps import bitmap_command, snapshot_command
from blockstep.cli.words import Argument, Command, Option, parsed, typer_app
from blockstep.errors import BlockstepError, OptionError, told
from blockstep.forms import Annotated, Literal
from blockstep.images import AUTO
from blockstep.streams import complain
from blockstep.units import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    import typer

    from blockstep.drivers.qcow2.check import CheckResult

HELP: Final = "Make, look at, compare, copy and change image files, with qemu-img's options and exit codes."

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
        if help_on_options(format, options, "-f"):
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
        async with opened(ImageName(filename, format, image_opts), writable=True, resizable=True) as image:
            with naming(filename):
                await resize(image, wanted_size(size, image.length), shrink, preallocation)
        if not quiet:
            print("Image resized.")

    run(work())


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
