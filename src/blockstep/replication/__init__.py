"""Replication: what moves the filters of `blockstep.drivers.replication`, and the two ends of a pair.

    hidden_disk   the disk buffer of active and hidden disk
    registry      start, checkpoint, get_error, stop over all filters of a process, all or nothing
"""
