"""What the commands of ``blockstep img`` have in common: options, progress, and how they end.

They exit as qemu-img's do: 1 for an error (``compare``: 2), where the other commands of blockstep exit with 3.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager

from blockstep.cli.signals import run_unless_told
from blockstep.cli.words import Argument, Option
from blockstep.errors import BlockstepError, OptionError, told
from blockstep.forms import Annotated, Literal
from blockstep.images import CacheMode
from blockstep.streams import complain, nobody_reads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    T = TypeVar("T")

Output = Literal["human", "json"]

_FORMAT = "raw, qcow2 or overlay; auto: what its content looks like."

Image = Annotated[str, Argument(metavar="FILENAME", help="The image.")]
Format = Annotated[str | None, Option("-f", "--format", metavar="FMT", help=f"The image's format: {_FORMAT}")]
ImageOpts = Annotated[bool, Option("--image-opts", help="Names of images are the options of nodes, "
                      "as in driver=qcow2,file.driver=file,file.filename=FILE.")]
Quiet = Annotated[bool, Option("-q", "--quiet", help="Print errors only.")]
Bar = Annotated[bool, Option("-p", "--progress", help="Show the progress also where there is no terminal.")]
Share = Annotated[bool, Option("-U", "--force-share", help="Taken, and of no effect: a reader keeps nobody out, "
                                     "and no writer keeps it out.")]
Cache = Annotated[CacheMode, Option("-t", "--cache", help="How the image that is written is cached; unsafe: "
                                          "nothing is made durable.")]
SourceCache = Annotated[CacheMode, Option("-T", "--source-cache", help="How images that are read are cached.")]
WholeCache = Annotated[CacheMode, Option("-T", "--source-cache", help="Taken, and of no effect: the image is read as a "
                                         "file.")]
OutputFormat = Annotated[Output, Option("--output", help="For people, or for programs.")]

Options = Annotated[list[str] | None, Option("-o", "--options", metavar="NAME=VALUE,...",
                    help="Options of the new image's format; help lists them.")]


def image_format(format: str, image_opts: bool) -> str | None:
    """The format of an image, of a command where it has a default: the options of a node say it themselves."""
    return None if image_opts else format


class Failed(Exception):
    """The command has said all, and ends with this exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def run(work: Coroutine[Any, Any, T], error_code: int = 1) -> T:
    """Do the work in an event loop. Errors are one line on standard error, and the exit code.

    At a signal files that are not complete are taken away, as after an error; see `run_unless_told`. The same when
    nobody reads what is printed: raises BrokenPipeError.
    """
    try:
        return run_unless_told(work)
    except Failed as failed:
        sys.exit(failed.code)
    except (BlockstepError, OSError) as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            raise
        complain(f"blockstep: {told(error)}")
        sys.exit(error_code)


@contextmanager
def shown(what: str, wanted: bool, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A function that is told (done, total) in bytes, and shows it.

    On a terminal a bar on standard error; elsewhere, if ``wanted``, the lines of qemu-img on standard output.
    """
    if quiet:
        yield lambda done, total: None
    elif sys.stderr.isatty() and sys.stdout.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        with Progress("{task.description}", BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
                      TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
            bar = bars.add_task(what, total=None)
            yield lambda done, total: bars.update(bar, completed=done, total=total)
    elif wanted:
        yield _Percent()
        print()
    else:
        yield lambda done, total: None


class _Percent:
    """As qemu-img: a line that is written over, in steps of a percent."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        percent = 100.0 * done / total if total else 100.0
        if percent >= self._next:
            print(f"    ({percent:.2f}/100%)\r", end="", flush=True)
            self._next = percent + 1.0 if percent < 99.0 else max(100.0, percent + 0.01)


def option_words(texts: list[str] | None) -> dict[str, str]:
    """All of ``-o`` together."""
    from blockstep.keyval import parse

    found: dict[str, str] = {}
    for text in texts or []:
        for name, value in parse(text, "-o").items():
            if not isinstance(value, str):
                raise OptionError("-o", name, "an option without parts")
            found[name] = value
    return found


def help_on_options(format: str, options: list[str] | None, option: str) -> bool:
    """Whether ``-o help`` was given; then it is printed. ``option``: how the format was given, for errors."""
    if options != ["help"] and options != ["?"]:
        return False
    from blockstep.images.create import creators, option_help

    if format not in creators():
        raise OptionError(option, format, "one of " + ", ".join(creators()))
    print(f"Supported {format} options:")
    print("\n".join(option_help(format)))
    return True
