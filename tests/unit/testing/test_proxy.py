"""The network that fails on command does not fail others."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from blockstep.testing.proxy import Proxy
from tests.scenarios import scenario


@scenario
async def test_sockets_that_are_made_while_a_connection_is_cut_are_heard() -> None:
    """They get the numbers of those that are closed, and the event loop knows sockets by their numbers."""
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.setblocking(False)
        proxy = Proxy("127.0.0.1", server.getsockname()[1], ports=1)
        async with proxy:
            near = stack.enter_context(socket.create_connection((proxy.host, proxy.port)))
            near.send(b"hello")
            far = stack.enter_context((await loop.sock_accept(server))[0])
            far.setblocking(False)
            assert await loop.sock_recv(far, 16) == b"hello"
            proxy.cut()
            heard: list[asyncio.Event] = []
            while proxy.connections or len(heard) < 8:
                ours, theirs = (stack.enter_context(sock) for sock in socket.socketpair())
                heard.append(asyncio.Event())
                loop.add_reader(ours, heard[-1].set)
                stack.callback(loop.remove_reader, ours)
                loop.call_later(0.01, theirs.send, b"x")
                await asyncio.sleep(0)
            for each in heard:
                await asyncio.wait_for(each.wait(), 5)
