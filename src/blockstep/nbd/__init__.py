"""The NBD protocol: pure parts that take and give bytes, and thin asyncio parts around them.

    constants            the numbers of the protocol
    wire                 requests, replies and chunks of the transmission phase; pure
    handshake            the server's half of the handshake; pure
    export, server, tls  the server
"""
