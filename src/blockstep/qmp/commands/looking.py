"""What the programs of a pair let people look at: nodes, graph, jobs. Nothing here changes anything.

These are commands of the storage daemon's areas. The rest of those areas is not offered: what a primary or a standby
holds is its own, and changes by the commands of the pair alone.
"""

from __future__ import annotations

from blockstep.qmp.commands import block_jobs, jobs, query_nodes
from blockstep.qmp.schema import Registry

commands = Registry()
for _area, _names in (
    (query_nodes.commands, ("query-named-block-nodes", "x-debug-query-block-graph")),
    (block_jobs.commands, ("query-block-jobs",)),
    (jobs.commands, ("query-jobs",)),
):
    for _name in _names:
        commands.commands[_name] = _area.commands[_name]
