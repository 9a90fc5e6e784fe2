"""How a primary is, in words: true at the moment in which they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from blockstep.daemon.disks import with_expiring, with_faults
from blockstep.daemon.files import Files
from blockstep.daemon.primary_checkpoints import Checkpoints
from blockstep.daemon.primary_setup import PrimaryConfig, PrimaryDisk
from blockstep.daemon.primary_standby import StandbySide
from blockstep.daemon.primary_sync import Sync
from blockstep.qmp.commands import replication as qmp
from blockstep.replication import coordinator as c


class PrimaryStatus:
    """Reads what the parts of a primary know; changes nothing."""

    def __init__(self, config: PrimaryConfig, disks: Mapping[str, PrimaryDisk], coordinator: c.Coordinator,
                 standby: StandbySide, checkpoints: Checkpoints, sync: Sync, files: Files,
                 clock: Callable[[], float]) -> None:
        self._config, self._disks, self._coordinator, self._standby = config, disks, coordinator, standby
        self._checkpoints, self._sync, self._files, self._clock = checkpoints, sync, files, clock

    def health(self) -> tuple[qmp.Health, str]:
        """How it is, and why it is not healthy."""
        theirs = [f"disk '{name}' of the standby: {fault}" for name, fault in self._standby.faults.items()]
        return with_expiring(with_faults(self._health(), [*self._files.told(), *theirs]), self._files.expiring)

    def _health(self) -> tuple[qmp.Health, str]:
        coordinator = self._coordinator
        wrong = [f"disk '{name}': {reason}" for name, disk in self._disks.items() for reason in disk.reasons]
        if coordinator.state in (c.State.OFFLINE, c.State.FENCED, c.State.STOPPED):
            return "at-risk", "; ".join([coordinator.reason, *wrong])
        if not coordinator.protected:
            return "degraded", "; ".join([coordinator.reason or "the first checkpoint is being taken", *wrong])
        if coordinator.reason or wrong:
            return "degraded", "; ".join(filter(None, [coordinator.reason, *wrong]))
        age, every = self._checkpoints.age, self._config.checkpoint_every
        if every and age > 3 * every + self._config.max_stall:
            return "degraded", f"the last checkpoint is {age:.1f} s old"
        return "healthy", ""

    def status(self, exports: list[str]) -> qmp.PairStatus:
        """The whole. ``exports``: where a guest finds the disks."""
        config, coordinator = self._config, self._coordinator
        health, reason = self.health()
        checkpoint = None
        if self._checkpoints.committed_at is not None:
            checkpoint = qmp.CheckpointStatus(epoch=coordinator.epoch, age=self._checkpoints.age,
                                              pause=self._checkpoints.pause)
        return qmp.PairStatus(
            pair=config.pair, role="primary", state=coordinator.state.value, health=health, reason=reason,
            link="", peer=str(config.standby), ack=config.ack, checkpoint_every=config.checkpoint_every,
            checkpoint_bytes=config.checkpoint_bytes, checkpoint=checkpoint,
            disks=[self._disk_status(name, disk) for name, disk in self._disks.items()], work=self._sync.status(),
            exports=exports)

    def _disk_status(self, name: str, disk: PrimaryDisk) -> qmp.DiskStatus:
        syncing = None if disk.link.on else disk.job
        state = "replicating" if disk.link.on else "syncing" if syncing else self._coordinator.state.value
        fault = self._files.faults.get(name, "")
        return qmp.DiskStatus(name=name, format=disk.spec.format, size=disk.link.length, state=state,
                              behind=syncing.left if syncing else disk.link.behind, buffer_used=0, buffer_limit=0,
                              reason="; ".join(filter(None, [fault, *disk.reasons])), fault=fault)

    def event(self) -> qmp.ReplicationState:
        """The state as it is announced. A checkpoint that is being taken is no news: nor would its end be."""
        health, reason = self.health()
        state = self._coordinator.state
        lasting = c.State.REPLICATING if state is c.State.CHECKPOINTING else state
        return qmp.ReplicationState(pair=self._config.pair, role="primary", state=lasting.value, health=health,
                                    reason=reason, epoch=self._coordinator.epoch)
