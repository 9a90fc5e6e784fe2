"""The programs: each composes graph, replication, exports and control socket, starts and stops them.

    service   what they share: control socket, signals, systemd notification
    export    ``blockstep export``: one disk over NBD
    standby   ``blockstep standby``
    primary   ``blockstep primary``
"""

from blockstep import drivers as _drivers  # noqa: F401  makes them known
