"""Whether an image is consistent, and what to do if not. Only qcow2 images have something to check."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from blockstep.drivers.qcow2.check import CheckResult, check
from blockstep.errors import BlockstepError, OptionError
from blockstep.images import is_address, is_options
from blockstep.images.whole import whole_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from blockstep.drivers.qcow2.repair import Repair
    from blockstep.images.opened import ImageName

#: qemu-img's exit codes.
CLEAN: Final = 0
CORRUPT: Final = 2
LEAKS: Final = 3
NO_CHECKS: Final = 63


class NothingToCheck(BlockstepError):
    """The format has nothing that could be inconsistent."""


async def check_image(image: ImageName, fix: Repair | None, report: Callable[[str], None]) -> CheckResult:
    """Check, and repair if ``fix`` says what; each finding is a sentence for ``report``, called in a thread.

    Nobody may write to the image meanwhile; a repair keeps other writers of ours out. Raises NothingToCheck,
    ImageError, OptionError and OSError.
    """
    from blockstep.aio.pool import in_thread

    image = image.as_file()
    if not image.is_file:
        raise _no_file(image.name)
    kind = await image.format_known()
    if kind != "qcow2":
        await in_thread(_readable, image.name)
        raise NothingToCheck(f"This image format does not support checks: {kind}")
    return await in_thread(_check, image.name, fix, report)


def _no_file(name: str) -> OptionError:
    return OptionError("FILENAME", name, "a file: what is behind a node or a network is not checked here")


def look(filename: str, report: Callable[[str], None]) -> CheckResult:
    """Check the qcow2 image in a file, as `check_image` does, in this thread and without an event loop."""
    if is_options(filename) or is_address(filename):
        raise _no_file(filename)
    return _check(filename, None, report)


def _readable(filename: str) -> None:
    with whole_file(filename, writable=False):
        pass


def _check(filename: str, fix: Repair | None, report: Callable[[str], None]) -> CheckResult:
    with whole_file(filename, writable=fix is not None) as file:
        if fix is None:
            return check(file.read, file.length, report)
        from blockstep.drivers.qcow2.repair import repair

        return repair(file.read, file.length, file.write, file.sync, fix, report)


def exit_code(result: CheckResult) -> int:
    """Of qemu-img: what is left after a repair counts."""
    if result.check_errors:
        return 1
    return CORRUPT if result.corruptions else LEAKS if result.leaks else CLEAN


def lines(result: CheckResult) -> Iterator[str]:
    """The result in qemu-img's words."""
    if result.corruptions_fixed or result.leaks_fixed:
        yield ("The following inconsistencies were found and repaired:\n\n"
               f"    {result.leaks_fixed} leaked clusters\n    {result.corruptions_fixed} corruptions\n\n"
               "Double checking the fixed image now...")
    if result.clean:
        yield "No errors were found on the image."
    if result.corruptions:
        yield (f"\n{result.corruptions} errors were found on the image.\n"
               "Data may be corrupted, or further writes to the image may corrupt it.")
    if result.leaks:
        yield (f"\n{result.leaks} leaked clusters were found on the image.\n"
               "This means waste of disk space, but no harm to data.")
    if result.check_errors:
        yield f"\n{result.check_errors} internal errors have occurred during the check."
    if result.total_clusters and result.allocated_clusters:
        yield (f"{result.allocated_clusters}/{result.total_clusters} = "
               f"{100 * result.allocated_clusters / result.total_clusters:.2f}% allocated, "
               f"{100 * result.fragmented_clusters / result.allocated_clusters:.2f}% fragmented, "
               f"{100 * result.compressed_clusters / result.allocated_clusters:.2f}% compressed clusters")
    if result.image_end_offset:
        yield f"Image end offset: {result.image_end_offset}"
