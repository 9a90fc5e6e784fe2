"""What a standby knows of itself, and what that is in words.

State, in a word: *waiting* for a primary, *syncing*, *replicating*, *resyncing* (it has a checkpoint, and a primary
that copies what came since, or everything), *lost* (it has a checkpoint, and the primary is gone), *failover* (it is
being promoted, or the merge runs), *promoted*, *failover-failed* (with some disks it has not ended), *stopping*,
*stopped*.

Nothing here waits or changes anything: the words are true at the moment in which they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from blockstep.daemon.disks import with_expiring, with_faults, work_status
from blockstep.daemon.files import Files
from blockstep.daemon.standby_room import Room
from blockstep.daemon.standby_setup import StandbyConfig, StandbyDisk
from blockstep.drivers.replication import Stage
from blockstep.jobs.job import Job
from blockstep.qmp.commands import replication as qmp
from blockstep.qmp.schema import Monitor


class Situation:
    """What a standby knows of itself: its parts write here what they do, and `Standby.status` reads it."""

    def __init__(self, config: StandbyConfig, clock: Callable[[], float], files: Files) -> None:
        self.config, self.clock, self.files = config, clock, files
        self.disks: dict[str, StandbyDisk] = {}
        #: What their buffers may hold.
        self.room = Room(config, self.disks)
        #: The connection of the primary that is attached.
        self.primary: Monitor | None = None
        #: What has become of the files of its disks, by their names, as it said last.
        self.primarys_faults: dict[str, str] = {}
        #: The connection whose checkpoint the views are. Another one's disks are something else until it commits.
        self.committed_by: Monitor | None = None
        #: The last checkpoint; 0: there is none.
        self.epoch = 0
        #: The last that was committed, also when it has been given up: what the disks held before the last resync.
        self.origin = 0
        self.committed_at = 0.0
        #: Which run of a primary has committed it; empty when another one may have written to the disks since.
        self.instance = ""
        #: A (re)sync has begun and has not ended: what the primary wrote last is no state that its disks ever were in.
        self.mixed = False
        #: What is being done just now. It may fail yet, and all is as before.
        self.ending: Literal["", "failover", "stop"] = ""
        #: The promotion's choice, once there is a disk with which it has begun.
        self.promoted_to: Literal["", "checkpoint", "latest"] = ""
        #: Likewise, that it was stopped.
        self.stopped = False
        #: Why the last operation of the primary failed.
        self.last_error = ""
        #: Why it cannot be written down whom the disks follow.
        self.unnoted = ""

    # --- facts ---

    @property
    def running(self) -> bool:
        """Whether all disks have a checkpoint."""
        return bool(self.disks) and all(disk.filter.stage is Stage.RUNNING for disk in self.disks.values())

    def declines(self) -> bool:
        """Whether no primary gets in any more."""
        return bool(self.promoted_to) or self.stopped

    @property
    def shut(self) -> bool:
        """Whether no primary gets in: for good, or for the moment."""
        return self.declines() or bool(self.ending)

    @property
    def keeps_latest(self) -> bool:
        """Whether a promotion, or a stop, leaves the disks as the primary wrote them last."""
        return self.stopped or self.promoted_to == "latest"

    @property
    def untouched(self) -> bool:
        """Whether no step of a promotion, or a stop, has been done with any disk: those with a checkpoint keep it."""
        return all(disk.filter.stage is Stage.NONE or (
            disk.filter.stage is Stage.RUNNING and disk.buffer and not disk.filter.failed_over)
            for disk in self.disks.values())

    @property
    def unfinished(self) -> list[StandbyDisk]:
        """The disks with which a promotion, or a stop, has to go on."""
        return [disk for disk in self.disks.values() if disk.filter.stage in (Stage.RUNNING, Stage.FAILOVER_FAILED)]

    # --- words ---

    @property
    def role(self) -> Literal["promoted", "standby"]:
        return "promoted" if self.promoted_to else "standby"

    @property
    def state(self) -> str:
        """One word; see the module."""
        if self.ending == "stop":
            return "stopping"
        if self.ending or any(disk.filter.stage is Stage.FAILOVER for disk in self.disks.values()):
            return "failover"
        if self.promoted_to:
            return "failover-failed" if self.unfinished else "promoted"
        if self.stopped:
            return "stopped"
        if self.running:
            if self.primary is None:
                return "lost"
            return "replicating" if self.committed_by is self.primary else "resyncing"
        return "syncing" if self.primary else "waiting"

    def health(self) -> tuple[qmp.Health, str]:
        """How it is, and why it is not healthy."""
        theirs = self.primarys_faults if self.primary and not self.declines() else {}
        told = [f"disk '{name}' of the primary: {fault}" for name, fault in theirs.items()]
        return with_expiring(with_faults(self._health(), [*self.files.told(), *told]), self.files.expiring)

    def _health(self) -> tuple[qmp.Health, str]:
        state = self.state
        if state == "failover-failed" or (state == "stopped" and self.unfinished):
            return "at-risk", self.what_is_left()
        if state in ("promoted", "failover", "stopping", "stopped"):
            return "degraded", "it has no standby of its own"
        reasons = [f"disk '{name}': {wrong}" for name, disk in self.disks.items() for wrong in self._wrong(disk)]
        if state in ("waiting", "syncing"):
            return "at-risk", "; ".join([self.last_error or "there is no checkpoint yet", *reasons])
        if state == "lost":
            return "at-risk", "; ".join([f"the primary is gone; the view is at checkpoint {self.epoch}", *reasons])
        reasons += filter(None, [self.last_error, self.unnoted])
        if state == "resyncing":
            reasons.insert(0, "the primary copies what is missing; until that is done the view stays at checkpoint "
                              f"{self.epoch}")
        return ("degraded", "; ".join(reasons)) if reasons else ("healthy", "")

    def _wrong(self, disk: StandbyDisk) -> list[str]:
        """The most important that is the matter with a disk, if it is not what the fault of its file says as well."""
        fault = self.files.faults.get(disk.spec.name)
        return [wrong for wrong in disk.wrong if not fault or (wrong not in fault and fault not in wrong)][:1]

    def lacks(self, disk: StandbyDisk) -> str:
        """What keeps a disk from being promoted, or stopped; empty if nothing does."""
        error = disk.filter.error
        why = f": {error.strerror or error}" if error else ""
        if disk.filter.stage is Stage.FAILOVER_FAILED:
            return f"promoted, but not merged{why}"
        if disk.filter.stage is Stage.RUNNING:
            return f"not {'promoted' if self.promoted_to else 'stopped'}, its view is at checkpoint {self.epoch}{why}"
        return ""

    def what_is_left(self) -> str:
        """How the disks are with which a promotion, or a stop, has to go on, and what to do; empty if all are well."""
        if not self.unfinished:
            return ""
        disks = "; ".join(f"disk '{disk.spec.name}' is {self.lacks(disk)}" for disk in self.unfinished)
        if not self.promoted_to:
            return f"{disks}. 'blockstep stop' again goes on with it"
        to = " --to latest" if self.promoted_to == "latest" else ""
        torn = "" if to else ", and until it succeeds do not end this program: the views are whole, the disks are not"
        return f"{disks}. 'blockstep failover{to}' again goes on with it{torn}"

    # --- the whole ---

    def status(self, link: str, exports: list[str], jobs: Sequence[Job]) -> qmp.PairStatus:
        """``link`` and ``exports``: where a primary and a guest find it. ``jobs``: the merges that run."""
        health, reason = self.health()
        checkpoint = None
        if self.epoch:
            checkpoint = qmp.CheckpointStatus(epoch=self.epoch, age=self.clock() - self.committed_at, pause=0.0)
        return qmp.PairStatus(
            pair=self.config.pair, role=self.role, state=self.state, health=health, reason=reason, link=link,
            peer=self.primary.peer if self.primary else "", ack="", checkpoint_every=0.0, checkpoint_bytes=0,
            checkpoint=checkpoint, disks=[self._disk_status(name, disk) for name, disk in self.disks.items()],
            work=work_status("failover", jobs) if jobs else None, exports=exports)

    def _disk_status(self, name: str, disk: StandbyDisk) -> qmp.DiskStatus:
        ended = self.declines() and not self.ending
        fault = self.files.faults.get(name, "")
        reasons = [fault, *([self.lacks(disk)] if ended else self._wrong(disk))]
        return qmp.DiskStatus(
            name=name, format=disk.spec.format, size=disk.view.length, state=self._disk_state(disk), behind=0,
            buffer_used=disk.buffer.used if disk.buffer else 0, buffer_limit=self.room.limit(name),
            reason="; ".join(filter(None, reasons)), fault=fault)

    def _disk_state(self, disk: StandbyDisk) -> str:
        if disk.filter.stage is Stage.DONE:
            return "stopped" if self.stopped or self.ending == "stop" else "promoted"
        return str(disk.filter.stage.value)

    def event(self) -> qmp.ReplicationState:
        """The state as it is announced."""
        health, reason = self.health()
        return qmp.ReplicationState(pair=self.config.pair, role=self.role, state=self.state, health=health,
                                    reason=reason, epoch=self.epoch)
