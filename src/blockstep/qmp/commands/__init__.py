"""The commands, one file per area. Each file has a `Registry` of its own; the daemon adds them together."""
