"""Host names to addresses.

`socket.getaddrinfo` fails with numbers of its own, which are no errno, with a UnicodeError for what can be no host
name, and without saying which name it was.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Sequence
from typing import Any

Found = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]


async def resolve(host: str, port: int | str | None, flags: int = 0) -> Sequence[Found]:
    """The addresses of ``host`` for streams, as of `socket.getaddrinfo`; an empty ``host`` is what ``flags`` make it.

    Raises OSError (EADDRNOTAVAIL) that names the host.
    """
    try:
        return await asyncio.get_running_loop().getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
    except (OSError, UnicodeError) as error:
        reason = "it is no host name" if isinstance(error, UnicodeError) else error.strerror or str(error)
        raise OSError(errno.EADDRNOTAVAIL, f"'{host}': {reason}") from None
