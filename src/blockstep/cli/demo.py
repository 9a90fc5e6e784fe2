"""``blockstep demo``: the main job on this machine, with proof; see `blockstep.cli.demonstration`."""

from __future__ import annotations

from pathlib import Path

from blockstep.cli.words import Option
from blockstep.errors import OptionError
from blockstep.forms import Annotated
from blockstep.images import FORMATS
from blockstep.units import parse_size


def demo(
    disk: Annotated[Path | None, Option("--disk", metavar="IMAGE", help="An image to work on a copy of; "
                    "otherwise disks with random content are made.")] = None,
    format: Annotated[str, Option("-f", "--format", metavar="FMT", help="The image's format, in which all disks "
                    "are made: raw, qcow2 or overlay. With qcow2 the standby's buffers are images as well.")] = "raw",
    disks: Annotated[int, Option("--disks", help="How many disks, 1 to 16.")] = 2,
    size: Annotated[str, Option("--size", help="The size of a made disk.")] = "64M",
    checkpoints: Annotated[int, Option("--checkpoints", help="How many, 1 to 100.")] = 5,
) -> None:
    """Replicate, take checkpoints, kill the primary, fail over, and prove what is left.

    Runs a primary and a standby on this machine for some seconds. Exit code 0: proven.
    """
    if format not in FORMATS:
        raise OptionError("--format", format, f"one of {', '.join(FORMATS)}")
    for option, number, most in (("--disks", disks, 16), ("--checkpoints", checkpoints, 100)):
        if not 1 <= number <= most:
            raise OptionError(option, number, f"1 to {most}")
    length = parse_size(size, "--size")
    from blockstep.cli.demonstration import show

    show(disk, format, disks, length, checkpoints)
