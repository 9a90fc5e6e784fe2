"""The block graph of a program as a picture: for people, who see in it what they do not see in JSON.

    answers of a QMP server ──assemble──► Picture ──► text (a tree, in colour)
                                                  ├─► DOT
                                                  └─► layout ──► SVG

A `Picture` is a plain value: boxes (nodes of the graph and those who use them) and edges, from users down to the
storage. It is put together from what any QMP server with QEMU's block commands answers, so that a running QEMU can
be drawn as well; what a server does not offer is left out. Everything below `assemble` is pure: it sees no socket.
"""
