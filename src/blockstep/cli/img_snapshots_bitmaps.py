"""``blockstep img snapshot`` and ``blockstep img bitmap``: what qcow2 images have inside beside the disk."""

from __future__ import annotations

from blockstep.cli.img_options import Image, ImageOpts, Quiet, Share, image_format, run
from blockstep.cli.words import Argument, Option, Order
from blockstep.errors import OptionError
from blockstep.forms import Annotated
from blockstep.units import parse_size


def snapshot_command(
    filename: Image,
    listed: Annotated[bool, Option("-l", "--list", help="List them; so does no option.")] = False,
    create: Annotated[str | None, Option("-c", "--create", metavar="NAME", help="Make one of this name.")] = None,
    apply: Annotated[str | None, Option("-a", "--apply", metavar="SNAPSHOT", help="Make the disk what it was "
                     "then.")] = None,
    delete: Annotated[str | None, Option("-d", "--delete", metavar="SNAPSHOT", help="Delete one.")] = None,
    format: Annotated[str, Option("-f", "--format", metavar="FMT", help="The image's format.")] = "qcow2",
    image_opts: ImageOpts = False,
    quiet: Quiet = False,
    share: Share = False,
) -> None:
    """The snapshots inside of a qcow2 image. SNAPSHOT is an id or a name. Nobody else may have the image open."""
    from blockstep.images.describe import snapshot_table
    from blockstep.images.opened import ImageName
    from blockstep.images.snapshot import Action, change_snapshots, snapshots_of

    async def work() -> None:
        image = ImageName(filename, image_format(format, image_opts), image_opts)
        all_given: tuple[tuple[str, Action, str | None], ...] = (
            ("-c", "create", create), ("-a", "apply", apply), ("-d", "delete", delete))
        given = [(option, action, name) for option, action, name in all_given if name is not None]
        if len(given) + listed > 1:
            raise OptionError(given[-1][0], given[-1][2], "the only one of -l, -a, -c and -d")
        if given:
            await change_snapshots(image, *given[0][1:])
        elif found := await snapshots_of(image):
            print("\n".join(["Snapshot list:", *snapshot_table(found)]))

    run(work())


def bitmap_command(
    order: Order,
    filename: Image,
    bitmap: Annotated[str, Argument(metavar="BITMAP", help="The bitmap's name.")],
    add: Annotated[bool, Option("--add", noted=True, help="Make it, enabled.")] = False,
    remove: Annotated[bool, Option("--remove", noted=True, help="Remove it.")] = False,
    clear: Annotated[bool, Option("--clear", noted=True, help="Nothing is dirty any more.")] = False,
    enable: Annotated[bool, Option("--enable", noted=True, help="It notes writes.")] = False,
    disable: Annotated[bool, Option("--disable", noted=True, help="It notes none.")] = False,
    merge: Annotated[list[str] | None, Option("--merge", metavar="SOURCE", noted=True, help="What is dirty "
                     "in SOURCE is dirty in it. May be given several times.")] = None,
    granularity: Annotated[str | None, Option("-g", "--granularity", metavar="SIZE", help="Of --add.")] = None,
    source: Annotated[str | None, Option("-b", "--source-file", metavar="FILE", help="The image of --merge's "
                      "bitmaps; default: the same.")] = None,
    source_format: Annotated[str, Option("-F", "--source-format", metavar="FMT", help="Its format.")] = "qcow2",
    format: Annotated[str, Option("-f", "--format", metavar="FMT", help="The image's format.")] = "qcow2",
    image_opts: ImageOpts = False,
) -> None:
    """Change a persistent bitmap of a qcow2 image: actions in the order given, all of them or none."""
    from typing import cast

    from blockstep.images.bitmap import BitmapAction, Kind, change_bitmap
    from blockstep.images.opened import ImageName

    async def work() -> None:
        actions: list[BitmapAction] = []
        for word in order:
            kind = cast(Kind, word)
            actions += [BitmapAction(kind, name) for name in (merge or [] if kind == "merge" else [""])]
        if not actions:
            raise OptionError("--add", None, "given, or one of --remove, --clear, --enable, --disable and --merge")
        if granularity is not None and not add:
            raise OptionError("-g", granularity, "given with --add only")
        if source is not None and not merge:
            raise OptionError("-b", source, "given with --merge only")
        other = None if source is None else ImageName(source, source_format, option="-F")
        image = ImageName(filename, image_format(format, image_opts), image_opts)
        await change_bitmap(image, bitmap, actions, None if granularity is None else parse_size(granularity, "-g"),
                            other)

    run(work())
