"""The control protocol: QMP, as server and as client.

    wire      bytes <-> JSON values                                  pure
    schema    commands and events, declared once                     pure
    errors    which error becomes which QMP class                    pure
    session   one connection: greeting, negotiation, commands        pure
    events    rate limits of events                                  pure
    server    sockets, monitors, order, bounds                       asyncio
    client    what the commands of blockstep use                     asyncio
    commands/ the commands themselves, one file per area, thin
"""
