"""The NBD protocol: pure parts that take and give bytes, and thin asyncio parts around them.

    constants            the numbers of the protocol
    wire                 requests, replies and chunks of the transmission phase; pure
    forms                the three forms in which a server replies; pure
    handshake            the server's half of the handshake; pure
    contexts, commands   what block status says; what each command does
    buffers              the memory that a connection receives into
    connection, server   a client of the server; listeners and exports
    export, tls          what is served; X.509 contexts for both sides
    client_handshake     the client's half of the handshake; pure
    uri, dial            where a server is, and how it is reached
    reply_table          what a server answered, for those who wait; pure
    session, client      one connection to a server; a client over several of them
"""
