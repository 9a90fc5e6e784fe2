"""blockstep: checkpointed block replication with instant failover, for any disk that can be reached over NBD."""

__version__ = "0.1.0"
