"""blockstep beside its peers: ``make bench``, or ``python -m benchmarks --help``.

An absolute figure means nothing on a shared machine. So the contestants of a row run in turn, round by round, in
one run, on disks in memory; a row's score is the ratio of two medians, or a time, and is held against two targets:
*at least*, which must hold, and *aim*.

    rows.py      what is measured: a row is data
    measures.py  how each kind of row is measured
    servers.py   how the contestants are started: blockstep, nbdkit, qemu-nbd, QEMU's replication
    tools.py     fio, a probing NBD client, resident memory, the page cache
    report.py    the table and the JSON
"""
