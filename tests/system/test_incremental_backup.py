"""Backups by a persistent bitmap, across restarts of a real daemon: in good order, and after SIGKILL."""

from __future__ import annotations

import contextlib
import errno
import json
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from blockstep.testing.pair import environment
from blockstep.testing.processes import QMP, blockstep, run, started, unix_uri
from blockstep.units import KiB, MiB
from tests.peers import need

pytestmark = pytest.mark.interop
need("qemu-img", "nbdinfo")

LIMIT: Final = 20.0
SIZE: Final = 8 * MiB


class Storage:
    """A daemon that has the disk open."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes], qmp: QMP) -> None:
        self.directory, self.process, self.qmp = directory, process, qmp

    def bitmaps(self) -> dict[str, dict[str, Any]]:
        nodes = self.qmp.execute("query-named-block-nodes")
        return {each["name"]: each for node in nodes if node["node-name"] == "disk"
                for each in node.get("dirty-bitmaps", [])}

    def dirty_by_nbd(self, bitmap: str) -> list[tuple[int, int]]:
        """What an NBD client sees as dirty; nobody can remove the bitmap meanwhile."""
        path = self.directory / "nbd"
        self.qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
        self.qmp.execute("block-export-add", **{"type": "nbd", "id": "shown", "node-name": "disk", "writable": True,
                                                "bitmaps": [bitmap]})
        assert self.bitmaps()[bitmap]["busy"]
        with pytest.raises(RuntimeError, match="in use by export"):
            self.qmp.execute("block-dirty-bitmap-remove", node="disk", name=bitmap)
        runs = json.loads(run("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{bitmap}", unix_uri(path, "disk")).stdout)
        self.qmp.execute("block-export-del", id="shown")
        self.qmp.execute("nbd-server-stop")
        return [(each["offset"], each["length"]) for each in runs if each["type"]]

    def write(self, offset: int, length: int, value: int) -> None:
        said = self.qmp.execute("human-monitor-command",
                                **{"command-line": f'qemu-io disk "write -P {value} {offset} {length}"'})
        assert "error" not in said.lower(), said

    def target(self, name: str, backing: str | None = None) -> Path:
        """A new image, and a node of its name for a backup to write to."""
        path = self.directory / f"{name}.qcow2"
        below = ["-b", f"{backing}.qcow2", "-F", "qcow2"] if backing else []
        run(*blockstep("img", "create", "-f", "qcow2", *below, path, *([] if backing else [str(SIZE)])))
        self.qmp.execute("blockdev-add", **{"driver": "qcow2", "node-name": name,
                                            "file": {"driver": "file", "filename": str(path)}})
        return path

    def ended(self, name: str) -> None:
        """Wait for the job ``name``, which must succeed, and close its target."""
        while (jobs := self.qmp.execute("query-jobs")) and jobs[0]["status"] != "concluded":
            pass
        assert "error" not in jobs[0], jobs
        self.qmp.execute("job-dismiss", id=name)
        self.qmp.execute("blockdev-del", **{"node-name": name})

    def quit(self) -> None:
        """Let the daemon end in good order."""
        self.qmp.execute("quit")
        assert self.process.wait(LIMIT) == 0

    def full_backup(self, name: str, bitmap: str) -> Path:
        """A full backup, and a bitmap that begins at its moment."""
        path = self.target(name)
        self.qmp.execute("transaction", actions=[
            {"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": bitmap, "persistent": True}},
            {"type": "blockdev-backup", "data": {"job-id": name, "device": "disk", "target": name, "sync": "full",
                                                 "auto-dismiss": False}}])
        self.ended(name)
        return path

    def incremental_backup(self, name: str, bitmap: str, backing: str) -> Path:
        path = self.target(name, backing)
        try:
            self.qmp.execute("blockdev-backup", **{
                "job-id": name, "device": "disk", "target": name, "sync": "incremental", "bitmap": bitmap,
                "auto-dismiss": False})
        except RuntimeError:
            self.qmp.execute("blockdev-del", **{"node-name": name})
            raise
        self.ended(name)
        return path


@contextlib.contextmanager
def storage(directory: Path) -> Iterator[Storage]:
    disk = {"driver": "qcow2", "node-name": "disk",
            "file": {"driver": "file", "filename": str(directory / "disk.qcow2")}}
    control = directory / "qmp"
    with started(blockstep("daemon", "--blockdev", json.dumps(disk), "--qmp", f"unix:{control}"), control,
                 env=environment()) as process, contextlib.closing(QMP(control)) as qmp:
        yield Storage(directory, process, qmp)


def same(disk: Path, backup: Path) -> None:
    run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", disk, backup)
    run("qemu-img", "check", "-q", disk)
    run("qemu-img", "check", "-q", backup)


def allocated(backup: Path) -> int:
    """Bytes that the image itself has."""
    found = json.loads(run("qemu-img", "map", "--output=json", backup).stdout)
    return sum(each["length"] for each in found if each["depth"] == 0 and each["data"])


def test_a_backup_goes_on_where_the_last_one_ended_though_the_daemon_was_restarted(tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    run(*blockstep("img", "create", "-f", "qcow2", disk, str(SIZE)))
    with storage(tmp_path) as first:
        first.write(0, 3 * MiB, 1)
        first.full_backup("full", "since")
        first.write(MiB, 64 * KiB, 2)
        first.process.terminate()
        assert first.process.wait(LIMIT) == 0
    with storage(tmp_path) as second:
        assert second.bitmaps()["since"] == {"name": "since", "count": 64 * KiB, "granularity": 64 * KiB,
                                             "recording": True, "busy": False, "persistent": True}
        assert second.dirty_by_nbd("since") == [(MiB, 64 * KiB)]
        second.write(6 * MiB, 64 * KiB, 3)
        backup = second.incremental_backup("one", "since", "full")
        second.quit()
    same(disk, backup)
    assert allocated(backup) == 128 * KiB
    with storage(tmp_path) as third:  # nothing was written since: nothing is in the bitmap
        assert third.bitmaps()["since"]["count"] == 0
        third.write(7 * MiB, 64 * KiB, 4)
        backup = third.incremental_backup("two", "since", "one")
        third.quit()
    same(disk, backup)
    assert allocated(backup) == 64 * KiB


def test_after_sigkill_a_backup_by_the_bitmap_is_refused_and_a_full_one_begins_anew(tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    run(*blockstep("img", "create", "-f", "qcow2", disk, str(SIZE)))
    with storage(tmp_path) as first:
        first.full_backup("full", "since")
        first.write(MiB, 64 * KiB, random.Random(1).randrange(1, 256))
        first.process.kill()
        first.process.wait(LIMIT)
    found = json.loads(run("qemu-img", "info", "--output=json", disk).stdout)["format-specific"]["data"]["bitmaps"]
    assert found == [{"name": "since", "granularity": 64 * KiB, "flags": ["in-use", "auto"]}]
    with storage(tmp_path) as second:
        assert second.bitmaps()["since"] == {"name": "since", "count": 0, "granularity": 64 * KiB, "recording": False,
                                             "busy": False, "persistent": True, "inconsistent": True}
        with pytest.raises(RuntimeError, match=r"inconsistent.*full backup"):
            second.incremental_backup("one", "since", "full")
        second.qmp.execute("block-dirty-bitmap-remove", node="disk", name="since")
        second.full_backup("again", "since")
        second.write(2 * MiB, 64 * KiB, 5)
        second.process.terminate()
        assert second.process.wait(LIMIT) == 0
    with storage(tmp_path) as third:
        backup = third.incremental_backup("two", "since", "again")
        third.quit()
    same(disk, backup)
    assert allocated(backup) == 64 * KiB


def test_a_daemon_that_cannot_store_the_bitmaps_says_so_at_its_end(tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    run(*blockstep("img", "create", "-f", "qcow2", disk, str(SIZE)))
    run(*blockstep("img", "bitmap", "--add", disk, "since"))
    faulty = {"driver": "blkdebug", "file": {"driver": "file", "filename": str(disk)},  # fails after the first flush
              "set-state": [{"event": "flush", "new_state": 2}],
              "inject-error": [{"event": "write", "state": 2, "errno": errno.ENOSPC}]}
    node = {"driver": "qcow2", "node-name": "disk", "file": faulty}
    control = tmp_path / "qmp"
    with (tmp_path / "stderr").open("w+") as said, started(
            blockstep("daemon", "--blockdev", json.dumps(node), "--qmp", f"unix:{control}"), control,
            env=environment(), stderr=said) as process:
        process.terminate()
        assert process.wait(LIMIT) == 1
        said.seek(0)
        assert re.search(r"'since' of node 'disk' could not be stored, and are inconsistent", said.read())


def test_what_a_daemon_has_open_is_not_changed_beside_it(tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    run(*blockstep("img", "create", "-f", "qcow2", disk, str(SIZE)))
    run(*blockstep("img", "bitmap", "--add", disk, "since"))
    with storage(tmp_path) as daemon:
        for action in ("--add", "--remove", "--clear", "--enable", "--disable", "--merge=since"):
            done = run(*blockstep("img", "bitmap", action, disk, "new" if action == "--add" else "since"), check=False)
            assert done.returncode == 1
            assert str(disk) in done.stderr
        daemon.write(0, 64 * KiB, 1)
        daemon.quit()
    run(*blockstep("img", "bitmap", "--add", "--merge=since", disk, "copy"))
    with storage(tmp_path) as daemon:
        assert daemon.bitmaps()["copy"]["count"] == daemon.bitmaps()["since"]["count"] == 64 * KiB
        daemon.quit()
