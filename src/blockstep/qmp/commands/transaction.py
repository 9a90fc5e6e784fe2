"""``transaction``: several changes as one.

All nodes that the actions name are drained from before the first action until after the last: so what several backups
copy, and what bitmaps begin to record, is of one moment. What waits for disks comes first: nodes are flushed, and new
persistent bitmaps stored. Then each action does all of it that can fail, at once, so that no other monitor's command
finds half a transaction; if one of them fails, those before it are taken back, last first, and nothing was changed.
Only then the jobs start, and bitmaps are really removed. Removed persistent bitmaps go from their images last: if that
fails the command does, and the rest has been done.

``completion-mode=grouped`` also ties the jobs together to their end: they succeed, or none of them does.

Source: QEMU's QMP reference, "Transactions".
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from blockstep.block.driver import Prepared
from blockstep.errors import noting
from blockstep.jobs.job import Job
from blockstep.jobs.transaction import JobTransaction
from blockstep.qmp.commands import bitmaps, copying, snapshots
from blockstep.qmp.commands.bitmaps import BitmapAdd, BitmapMerge, BitmapName
from blockstep.qmp.commands.holder import Holder
from blockstep.qmp.errors import CommandError
from blockstep.qmp.schema import Arguments, Registry

commands = Registry()


class Action(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, kw_only=True, tag_field="type"):
    """Base of actions: ``type`` is the name of a command, ``data`` its arguments."""


class Abort(Action, tag="abort"):
    """Fail, so that nothing is changed: for tests."""

    data: Arguments


class BitmapAddAction(Action, tag="block-dirty-bitmap-add"):
    """As the command."""

    data: BitmapAdd


class BitmapRemoveAction(Action, tag="block-dirty-bitmap-remove"):
    """As the command."""

    data: BitmapName


class BitmapClearAction(Action, tag="block-dirty-bitmap-clear"):
    """As the command."""

    data: BitmapName


class BitmapEnableAction(Action, tag="block-dirty-bitmap-enable"):
    """As the command."""

    data: BitmapName


class BitmapDisableAction(Action, tag="block-dirty-bitmap-disable"):
    """As the command."""

    data: BitmapName


class BitmapMergeAction(Action, tag="block-dirty-bitmap-merge"):
    """As the command."""

    data: BitmapMerge


class BackupAction(Action, tag="blockdev-backup"):
    """As the command."""

    data: copying.BackupArguments


class SnapshotAction(Action, tag="blockdev-snapshot"):
    """As the command."""

    data: snapshots.SnapshotArguments


class DriveBackupAction(Action, tag="drive-backup"):
    """Refused: open the target with blockdev-add, and use blockdev-backup."""

    data: dict[str, Any]


AnyAction = (Abort | BitmapAddAction | BitmapRemoveAction | BitmapClearAction | BitmapEnableAction | BitmapDisableAction
             | BitmapMergeAction | BackupAction | SnapshotAction | DriveBackupAction)


class TransactionProperties(Arguments):
    """Properties of a transaction."""

    completion_mode: Annotated[Literal["individual", "grouped"], Meta(description=(
        "grouped: the jobs succeed or fail together; only for transactions that have jobs and nothing else."))
    ] = "individual"


class TransactionArguments(Arguments):
    """Arguments of transaction."""

    actions: Annotated[list[AnyAction], Meta(description="What is done, in this order.")]
    properties: Annotated[TransactionProperties, Meta(description="How.")] = (
        msgspec.field(default_factory=TransactionProperties))


@commands.command("transaction")
async def transaction(context: Holder, args: TransactionArguments) -> None:
    """Do several changes, or none of them if one fails."""
    steps = _Steps(context, args.properties.completion_mode == "grouped")
    nodes = [context.inventory.graph.nodes.get(name) for action in args.actions if (name := _node_of(action))]
    async with context.inventory.graph.drained(*(node for node in nodes if node is not None)):
        try:
            for action in args.actions:
                await steps.begin(action)
            for action in args.actions:
                await steps.prepare(action)
        except BaseException as error:
            await steps.abort(error)
            raise
        steps.commit()
        for name in steps.stored:
            await bitmaps.keep(context, name)


class _Steps:
    """What the actions so far have prepared."""

    def __init__(self, context: Holder, grouped: bool) -> None:
        self._context = context
        self._together = JobTransaction() if grouped else None
        self._commit: list[Callable[[], None]] = []
        self._abort: list[Callable[[], Awaitable[None] | None]] = []
        #: Nodes whose persistent bitmaps go.
        self.stored: set[str] = set()

    async def begin(self, action: AnyAction) -> None:
        """What waits for a disk."""
        context = self._context
        if self._together is not None:  # what is no job is refused in its turn
            return
        if isinstance(action, SnapshotAction):
            await snapshots.flush(context, action.data)
        elif isinstance(action, BitmapAddAction) and action.data.persistent:
            prepared, node = await bitmaps.add(context, action.data), action.data.node
            self._abort += [lambda: bitmaps.keep(context, node), prepared.abort]

    async def prepare(self, action: AnyAction) -> None:
        """All of an action that can fail; nothing in it waits."""
        if isinstance(action, BackupAction):
            job = await copying.create_backup(self._context, action.data, self._together)
            self._commit.append(job.start)
            self._abort.append(lambda: _forget(job))
            return
        if isinstance(action, Abort):
            raise CommandError("the transaction was aborted by its action 'abort'")
        if self._together is not None:
            raise CommandError(f"action '{action.__struct_config__.tag}' is no job, and cannot be one of a transaction "
                               "with completion-mode=grouped")
        prepared = self._prepare_change(action)
        self._commit.append(prepared.commit)
        self._abort.append(prepared.abort)

    def _prepare_change(self, action: AnyAction) -> Prepared:
        context = self._context
        if isinstance(action, SnapshotAction):
            return snapshots.prepare(context, action.data)
        if isinstance(action, BitmapAddAction):
            return Prepared() if action.data.persistent else bitmaps.prepare_add(context, action.data)
        if isinstance(action, BitmapMergeAction):
            return bitmaps.prepare_merge(context, action.data)
        if isinstance(action, DriveBackupAction | Abort | BackupAction):
            raise CommandError("drive-backup is not possible: open the target with blockdev-add; then blockdev-backup")
        bitmap = bitmaps.bitmap_named(context, action.data)
        if isinstance(action, BitmapRemoveAction):
            if bitmap.persistent:
                self.stored.add(action.data.node)
            return bitmap.prepare_remove()
        if isinstance(action, BitmapClearAction):
            return bitmap.prepare_clear()
        return bitmap.prepare_enabled(isinstance(action, BitmapEnableAction))

    def commit(self) -> None:
        """The second halves."""
        for commit in self._commit:
            commit()

    async def abort(self, error: BaseException) -> None:
        """Take everything back, last first, because of ``error``."""
        while self._abort:
            with noting(error):
                waiting = self._abort.pop()()
                if waiting is not None:
                    await waiting


async def _forget(job: Job) -> None:
    """End a job that has not started."""
    job.end(force=True)
    await job.wait()


def _node_of(action: AnyAction) -> str | None:
    """The name of the node that an action must find at rest."""
    if isinstance(action, Abort | DriveBackupAction):
        return None
    return action.data.device if isinstance(action, BackupAction) else action.data.node
