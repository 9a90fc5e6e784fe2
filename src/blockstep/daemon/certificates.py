"""When a program's certificates expire: said before it comes, for a pair that runs does not notice.

A connection that stands outlives its certificates; the next one is refused, and so a pair whose certificates have
expired goes on until its link is interrupted for a moment, and cannot come back. It is degraded before: when less than
a tenth of a certificate's time is left, at most `EARLY`. Renewed files are taken without a restart: see
`blockstep.nbd.tls`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from blockstep.aio.pool import in_thread
from blockstep.nbd.tls import CA_CERT, CLIENT_CERT, SERVER_CERT

#: Seconds before the end from which on it is told, if that is less than a tenth of the whole.
EARLY: Final = 14 * 86400.0


class Certificates:
    """See the module. ``files``: their names."""

    def __init__(self, files: Iterable[Path], now: Callable[[], float] = time.time) -> None:
        self._files, self._now = list(dict.fromkeys(files)), now

    async def look(self) -> list[str]:
        """Read them. Returns one text for each that has expired, or will soon."""
        valid = await in_thread(_read, self._files) if self._files else {}
        found = []
        for path, (begin, end) in valid.items():
            left = end - self._now()
            if left < min(EARLY, (end - begin) / 10):
                when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(end))
                found.append(f"the certificate {path} {'expired' if left < 0 else 'expires'} on {when}")
        return found


def of_server(folder: Path | None) -> list[Path]:
    """The certificates of a server whose clients have some too."""
    return [folder / CA_CERT, folder / SERVER_CERT] if folder else []


def of_client(folder: Path | None) -> list[Path]:
    """Those of a client."""
    return [folder / CA_CERT, folder / CLIENT_CERT] if folder else []


def _read(files: Iterable[Path]) -> dict[Path, tuple[float, float]]:
    """For a thread. What cannot be read is for those to say who need it."""
    from blockstep.nbd.certificate import validity  # not before it is needed: at the start there is other work
    found = {}
    for path in files:
        with suppress(OSError, ValueError):
            found[path] = validity(path)
    return found
