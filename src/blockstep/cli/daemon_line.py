"""The command line of ``blockstep daemon``, which is that of qemu-storage-daemon.

Its options are not typer's: they are carried out in their order, each may be given many times, and their values are
``key=value`` lists or JSON. `blockstep.daemon.startup` says what each of them does; here they are told apart, the
process goes into the background if it is to, and errors become one line and exit code 1.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from blockstep.errors import BlockstepError, told
from blockstep.streams import complain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

FAILED: Final = 1

#: Options that are carried out in their order.
STEPS: Final = ("object", "blockdev", "nbd-server", "export", "chardev", "monitor", "qmp")
#: Options of the process as a whole -> whether they have a value.
WHOLE: Final = {"help": False, "version": False, "daemonize": False, "pidfile": True, "name": True}
_SHORT: Final = {"-h": "help", "-V": "version"}


class CommandLine:
    """The words, told apart."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, str]] = []
        self.whole: dict[str, str] = {}


def split(arguments: Sequence[str]) -> CommandLine:
    """Tell options and values apart: ``--option VALUE`` or ``--option=VALUE``; unique beginnings of names will do.

    Raises BlockstepError that names the word that is wrong.
    """
    line = CommandLine()
    words = iter(arguments)
    for word in words:
        name, equals, value = _option(word)
        if name in WHOLE and not WHOLE[name]:
            if equals:
                raise BlockstepError(f"--{name} takes no value, and '{value}' was given")
            line.whole[name] = ""
            continue
        if not equals:
            try:
                value = next(words)
            except StopIteration:
                raise BlockstepError(f"--{name} needs a value") from None
        if name in WHOLE:
            line.whole[name] = value
        else:
            line.steps.append((name, value))
    return line


def _option(word: str) -> tuple[str, str, str]:
    if word in _SHORT:
        return _SHORT[word], "", ""
    if not word.startswith("--") or word == "--":
        raise BlockstepError(f"'{word}' is no option; options begin with '--', see --help")
    name, equals, value = word[2:].partition("=")
    known = (*STEPS, *WHOLE)
    found = [name] if name in known else [one for one in known if name and one.startswith(name)]
    if not found:
        raise BlockstepError(f"there is no option '--{name}'; the options are "
                             f"{', '.join(f'--{one}' for one in known)}")
    if len(found) > 1:
        raise BlockstepError(f"'--{name}' may be {' or '.join(f'--{one}' for one in found)}")
    return found[0], equals, value


def main(arguments: Sequence[str]) -> int:
    """The program. Returns its exit code: 0, or 1 for every error, which is one line on standard error."""
    try:
        line = split(arguments)
        if "help" in line.whole:
            from blockstep.cli.daemon_help import full_help

            print(full_help())
        elif "version" in line.whole:
            from blockstep import __version__

            print(f"blockstep daemon {__version__}")
        elif (wanted := _wanted_help(line)) is not None:
            from blockstep.cli.daemon_help import option_help

            print(option_help(*wanted))
        else:
            _serve(line)
    except (BlockstepError, OSError) as error:
        complain(f"blockstep: {told(error)}")
        return FAILED
    return 0


def _wanted_help(line: CommandLine) -> tuple[str, str] | None:
    """``--OPTION help`` or ``--OPTION WHAT,help``: (OPTION, WHAT)."""
    for option, text in line.steps:
        words = text.split(",")
        if text in ("help", "?"):
            return option, ""
        if len(words) == 2 and words[1] in ("help", "?"):
            return option, words[0].rpartition("=")[2]
    return None


def _serve(line: CommandLine) -> None:
    from blockstep.aio.loop import run
    from blockstep.daemon.daemonize import daemonize
    from blockstep.daemon.startup import DaemonConfig, main
    from blockstep.nbd.server import passed_sockets

    # The process that was started is the one that systemd has handed them to.
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    fds = passed_sockets()
    passed = {names[index] if index < len(names) and names.count(names[index]) == 1 and names[index] else str(fd): fd
              for index, fd in enumerate(fds)}
    background = "daemonize" in line.whole
    serving = daemonize() if background else lambda: None
    run(main(DaemonConfig(line.steps, line.whole.get("name"), line.whole.get("pidfile"), passed, background), serving))
