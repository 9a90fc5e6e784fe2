"""Where the drivers are that nobody has needed yet: ``driver`` name -> module.

`blockstep.drivers` fills it, `blockstep.block.registry` imports a module when its driver is asked for: a command that
looks at one file does not wait for the import of NBD and TLS. Nothing is imported here, for the same reason.
"""

MODULES: dict[str, str] = {}
