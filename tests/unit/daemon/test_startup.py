"""How the command line of a daemon is carried out, up to the moment in which it is served."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from blockstep.daemon.daemonize import PidFile
from blockstep.daemon.startup import Startup
from blockstep.daemon.storage import StorageDaemon
from blockstep.errors import BlockstepError
from tests.scenarios import scenario


@scenario
async def test_nobody_is_answered_before_all_options_are_done(tmp_path: Path) -> None:
    program = StorageDaemon()
    startup = Startup(program, {})
    try:
        await startup.run([("qmp", f"unix:{tmp_path}/qmp"), ("nbd-server", f"addr.type=unix,addr.path={tmp_path}/nbd")])
        early = [await asyncio.open_unix_connection(tmp_path / name) for name in ("qmp", "nbd")]
        said = [asyncio.ensure_future(reader.read(8)) for reader, _ in early]
        await startup.run([("blockdev", "null,node-name=n"), ("export", "nbd,id=e,node-name=n")])
        for _ in range(20):  # whoever accepts them would have had many turns to do it
            await asyncio.sleep(0)
        assert not any(answer.done() for answer in said)
        await startup.serve()
        assert await asyncio.gather(*said) == [b'{"QMP":{', b"NBDMAGIC"]
        for _, writer in early:
            writer.close()
    finally:
        await program.close()
        startup.close()
    assert list(tmp_path.iterdir()) == []


@scenario
async def test_a_monitor_in_one_takes_no_name_from_the_users_character_devices(tmp_path: Path) -> None:
    program = StorageDaemon()
    startup = Startup(program, {})
    try:
        await startup.run([("chardev", f"socket,id=qmp1,path={tmp_path}/a,server=on,wait=off"),
                           ("qmp", f"unix:{tmp_path}/b"), ("qmp", f"unix:{tmp_path}/c"),
                           ("chardev", f"socket,id=qmp2,path={tmp_path}/d,server=on,wait=off"), ("monitor", "qmp2")])
        await startup.serve()
        assert [str(listener.address) for listener in program.qmp.listeners] == [f"{tmp_path}/{name}" for name in "bcd"]
    finally:
        await program.close()
        startup.close()


def test_a_pidfile_that_is_no_file_is_refused_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pid")
    with pytest.raises(BlockstepError, match="no regular file"):
        PidFile(str(tmp_path / "pid"))
    assert (tmp_path / "pid").is_fifo()


def test_a_pidfile_that_cannot_be_written_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        PidFile(str(tmp_path / "pid"))
    assert list(tmp_path.iterdir()) == []
