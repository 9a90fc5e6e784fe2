"""The fuzzer: broken images, one after the other, for as long as it is told.

    python -m tests.fuzz --seconds 60                    # other cases each time
    python -m tests.fuzz --seed 7 --first 1000 --cases 1 # one of them again, with what it says

Exit code 1: there were findings. Each is a line of JSON in the log. A case that ends the process as well (a hang, a
crash) is the one whose number stands in the file beside the log that ends with ``.at``.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Final

from tests.fuzz.mutate import DATA_FILE, KINDS, mutated, sound
from tests.fuzz.use import use

#: What a case may take: seconds of the processor, bytes of address space beyond what the process has (of which the
#: threads' stacks and heaps reserve half a GiB and use little), and seconds after which it hangs.
PROCESSOR: Final = 10.0
MEMORY: Final = 1280 << 20
HANGS: Final = 300.0
#: Bytes of a file: what is written far behind its end fails.
FILE: Final = 1 << 34


class TooLong(BaseException):
    """A case has used up its time."""


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLong(f"more than {PROCESSOR:g} s of the processor")


def limit_memory() -> None:
    """From now on the process gets no more than `MEMORY` beyond what it has."""
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def one(seed: int, number: int, directory: Path) -> tuple[str, int, BaseException | None]:
    """The case ``number``: what was done to its image, how many steps had a value, and the finding."""
    rnd = random.Random(f"{seed}-{number}")
    data, told = mutated(rnd)
    path = directory / "image"
    path.write_bytes(data)
    with (directory / DATA_FILE).open("wb") as file:
        file.write(b"\x07" * (100 << 10))
        file.truncate(8 << 20)
    signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, PROCESSOR)
    try:
        return told, use(path, rnd), None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return told, 0, error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        for left in directory.iterdir():
            left.unlink()


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Use broken qcow2 images.")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--cases", type=int, default=sys.maxsize)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--log", type=Path, help="findings and the last case are appended")
    options = parser.parse_args()
    for kind in dict.fromkeys(KINDS):
        sound(kind)
    limit_memory()
    log = options.log.open("a", buffering=1) if options.log else sys.stdout
    end, number, found, good = time.monotonic() + options.seconds, options.first, 0, 0
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as directory:
        while number < options.first + options.cases and time.monotonic() < end:
            if options.log:
                options.log.with_suffix(".at").write_text(f"{options.seed} {number}\n")
            faulthandler.dump_traceback_later(HANGS, exit=True)
            told, values, finding = one(options.seed, number, Path(directory))
            faulthandler.cancel_dump_traceback_later()
            good += values
            if finding is not None:
                found += 1
                text = "".join(traceback.format_exception(finding))
                print(json.dumps({"seed": options.seed, "case": number, "image": told,
                                  "finding": f"{type(finding).__name__}: {finding}"}), file=log)
                print(text, file=sys.stderr if options.cases == 1 else log)
            number += 1
    print(f"seed {options.seed}: cases {options.first} to {number - 1}, {good} steps with a value, {found} findings",
          file=log)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
