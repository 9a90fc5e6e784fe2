"""The block graph: nodes that hold data, the edges between them, and the users above them.

    user ── Backend ──► node ──► node ──► node          io.py: the border; data half
                          │
                          └─Child─► node                 node.py: nodes, edges, permissions taken and shared
                                                         graph.py: changes, all or nothing; control half
                                                         driver.py: what a node promises about data
"""
