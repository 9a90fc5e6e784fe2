"""Everything that blockstep knows about asyncio beyond its manual: see the modules."""

#: Data that is read or written.
Buffer = bytes | bytearray | memoryview
