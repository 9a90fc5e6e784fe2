"""Standard input, output and error: whoever starts a program may have closed them, or let nobody read."""

from __future__ import annotations

import codecs
import io
import os
import select
import sys


def open_missing() -> None:
    """Open what is closed of the three on /dev/null, for this process and those that it starts.

    Otherwise the next file that is opened gets the number: a disk into which a message is printed, or that is closed
    when the process goes into the background.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def print_all_names() -> None:
    """Let standard output take all that is said: names of files that are no text there as the bytes that they are.

    Characters that its encoding does not have become question marks.
    """
    codecs.register_error("blockstep", _as_bytes)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="blockstep")


def _as_bytes(error: UnicodeError) -> tuple[bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    codes = (ord(letter) for letter in error.object[error.start:error.end])
    return bytes(code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else ord("?") for code in codes), error.end


def nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has gone."""
    poll = select.poll()
    poll.register(1, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def announce(*lines: str) -> None:
    """Print what a server says when it serves. If that cannot be, it serves all the same, and prints nothing more.

    Standard error says why, unless whoever was to read it has gone.
    """
    try:
        print(*lines, sep="\n", flush=True)
    except OSError as error:
        forget(1)
        if not isinstance(error, BrokenPipeError):
            complain(f"blockstep: what is served could not be printed: {error.strerror}")


def complain(text: str) -> None:
    """Print a line on standard error. If that cannot be, nobody is to be told, and it is no reason to fail."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        forget(2)


def forget(number: int) -> None:
    """Standard output (1) or error (2) goes nowhere from now on, and so does what was held back of it."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
