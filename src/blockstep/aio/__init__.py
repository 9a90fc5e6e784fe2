"""Everything that blockstep knows about asyncio beyond its manual: see the modules."""
