"""Host names to addresses, and ports as texts.

`socket.getaddrinfo` fails with numbers of its own, which are no errno, with a UnicodeError for what can be no host
name, and without saying which name it was.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Sequence
from typing import Any

from blockstep.errors import OptionError

Found = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]


def parse_port(text: str, option: str, least: int = 0) -> int:
    """The number of a TCP port. Raises OptionError that names ``option``."""
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) < 65536):
        raise OptionError(option, text, f"a port number, {least} to 65535")
    return int(text)


async def resolve(host: str, port: int | str | None, flags: int = 0) -> Sequence[Found]:
    """The addresses of ``host`` for streams, as of `socket.getaddrinfo`; an empty ``host`` is what ``flags`` make it.

    Raises OSError (EADDRNOTAVAIL) that names the host.
    """
    try:
        return await asyncio.get_running_loop().getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
    except (OSError, UnicodeError) as error:
        reason = "it is no host name" if isinstance(error, UnicodeError) else error.strerror or str(error)
        raise OSError(errno.EADDRNOTAVAIL, f"'{host}': {reason}") from None
