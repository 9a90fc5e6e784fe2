"""Space runs out: in the standby's buffer (D3), on the standby's disk, on the primary's disk."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import run

import pytest

from blockstep.errors import BlockstepError
from blockstep.images.convert import Conversion, convert
from blockstep.images.opened import ImageName
from blockstep.testing.pair import Pair
from blockstep.units import KiB, MiB
from tests.peers import need
from tests.scenarios import limit_files, make_room, scenario, small_file_system


@contextmanager
def thin_file_system(small: Path) -> Iterator[Path]:
    """An ext4 of 128 MiB, without a journal, over a device that gets its space from ``small``, block by block."""
    need("mkfs.ext4", "losetup")
    image, place = small / "device", small.parent / "thin"
    place.mkdir()
    image.touch()
    os.truncate(image, 128 * MiB)
    run(["mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal", "-E", "nodiscard", str(image)], check=True)
    done = run(["mount", "-o", "loop,errors=continue", str(image), str(place)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield place
    finally:
        run(["umount", "-l", str(place)], check=True)


def take_room(small: Path, thin: Path) -> None:
    """From now on there is no room for most of what it holds: a thin pool that is full."""
    run(["sync", "-f", str(thin)], check=True)
    device = small / "device"
    run(["fallocate", "-p", "-o", str(16 * MiB), "-l", str(112 * MiB), str(device)], check=True)
    run(["mount", "-o", f"remount,size={device.stat().st_blocks * 512 + 4 * MiB}", str(small)], check=True)


def forget_cached(path: Path) -> None:
    """What was not written is gone, as after a power failure."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@scenario
async def test_what_a_disk_had_no_room_for_is_not_found_there_by_the_next_standby(tmp_path: Path) -> None:
    """The kernel tells of it once, and has it in its cache as if it had been written."""
    size = 32 * MiB
    with small_file_system(tmp_path, 256 * MiB) as small, thin_file_system(small) as thin:
        disk = thin / "disk"
        disk.write_bytes(bytes(size))
        take_room(small, thin)
        async with Pair(tmp_path, size=size) as pair:
            (tmp_path / "disk0.standby").symlink_to(disk)
            (tmp_path / "disk0.primary").write_bytes(os.urandom(size))
            await pair.start()
            await pair.primary.heard("REPLICATION_STATE", state="offline")
            make_room(small)
            await pair.standby.execute("quit")
            await pair.standby.ended()
            await pair.start_standby(link=pair.link)
            await pair.primary.until(health="healthy")
            await pair.primary.execute("replication-checkpoint")
            pair.primary.kill()
            pair.standby.kill()
            forget_cached(disk)
            assert disk.read_bytes() == (tmp_path / "disk0.primary").read_bytes()


@scenario
async def test_a_checkpoint_is_taken_before_the_buffer_is_full(tmp_path: Path) -> None:
    async with Pair(tmp_path, disks=2, size=4 * MiB) as pair:
        await pair.start(standby=["--buffer-memory", "1M"])
        epoch = (await pair.primary.until(health="healthy"))["checkpoint"]["epoch"]
        for _ in range(5):
            await pair.write(300)  # 6 MB in all, of random places in 8 MiB
        status = await pair.primary.status()
        assert status["health"] == "healthy"
        assert status["checkpoint"]["epoch"] >= epoch + 2
        assert not [event for event in pair.standby.events if event["event"] == "REPLICATION_IO_ERROR"]
        await pair.checkpoint_shows()


@scenario
async def test_small_writes_that_fill_much_of_the_buffer_are_seen_by_asking(tmp_path: Path) -> None:
    async with Pair(tmp_path, size=2 * MiB) as pair:
        await pair.start("--max-stall", "200ms", standby=["--buffer-memory", "1M"])
        epoch = (await pair.primary.until(health="healthy"))["checkpoint"]["epoch"]
        async with pair.primary.clients() as (guest,):
            for number in range(150):  # each saves 4 KiB
                await guest.pwrite(number * 4096, b"!")
        await pair.primary.until(lambda status: status["checkpoint"]["epoch"] > epoch)
        assert (await pair.standby.status())["disks"][0]["buffer-used"] < 512 * KiB


@scenario
async def test_a_full_buffer_costs_the_guest_nothing_and_the_pair_recovers_by_itself(tmp_path: Path) -> None:
    """D3. One write is larger than the buffer: no checkpoint can come in time."""
    async with Pair(tmp_path, disks=2, size=4 * MiB) as pair:
        await pair.start(standby=["--buffer-memory", "256k"])
        await pair.primary.until(health="healthy")
        await pair.write(10)
        await pair.checkpoint()
        async with pair.primary.clients() as (guest, _):
            await guest.pwrite(0, bytes(2 * MiB))
            await guest.pwrite(MiB, b"later")
            lost = await pair.primary.heard("REPLICATION_STATE", state="offline")
            assert lost["reason"].count("No space left on device") == 1
            error = await pair.standby.heard("REPLICATION_IO_ERROR")
            assert "memory-limit" in error["reason"]
            events = len(pair.primary.events)
            await pair.primary.until(health="healthy")
            syncs = [event["data"]["reason"] for event in pair.primary.events[events:]
                     if event["data"].get("state") == "syncing"]
            assert syncs
            assert set(syncs) == {"copying what the standby lacks"}
            await guest.pwrite(3 * MiB, b"and so on")
        await pair.standby.heard("REPLICATION_STATE", state="syncing", health="at-risk")
        await pair.primary.execute("replication-checkpoint")
        assert (await pair.standby.status())["health"] == "healthy"
        assert await pair.standby.read_disks() == await pair.primary.read_disks()


@scenario
async def test_a_full_buffer_keeps_its_checkpoint_until_a_resync_has_found_no_room_either(tmp_path: Path) -> None:
    async with Pair(tmp_path, size=4 * MiB) as pair:
        await pair.start(standby=["--buffer-memory", "256k"])
        await pair.primary.until(health="healthy")
        await pair.write(10)
        await pair.checkpoint()
        async with pair.primary.clients() as (guest,):
            await guest.pwrite(0, bytes(2 * MiB))
            await pair.primary.heard("REPLICATION_STATE", state="offline")
            pair.primary.kill()
        await pair.standby.until(state="lost")
        await pair.standby.execute("replication-failover")
        assert await pair.proven(pair.standby) == 10


@scenario
async def test_a_buffer_that_spills_takes_what_memory_does_not(tmp_path: Path) -> None:
    spill = tmp_path / "spill"
    spill.mkdir()
    async with Pair(tmp_path, size=4 * MiB) as pair:
        await pair.start(standby=["--buffer-memory", "256k", "--buffer-dir", str(spill)])
        await pair.primary.until(health="healthy")
        await pair.write(10)
        await pair.checkpoint()
        async with pair.primary.clients() as (guest,):
            await guest.pwrite(0, bytes(2 * MiB))
        await pair.primary.until(lambda status: not status["disks"][0]["behind"])
        assert (await pair.primary.status())["health"] == "healthy"
        pair.primary.kill()
        await pair.standby.execute("replication-failover")
        assert await pair.proven(pair.standby) == 10
        await pair.standby.until(state="promoted")
        assert await pair.proven(pair.standby) == 10


def room(place: Path) -> int:
    """Bytes that are free in a file system."""
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize


@scenario
@pytest.mark.parametrize("kind", ["overlay", "qcow2"])
async def test_a_checkpoint_is_taken_before_the_file_system_of_the_buffers_is_full(tmp_path: Path, kind: str) -> None:
    with small_file_system(tmp_path, 2 * MiB) as place:
        async with Pair(tmp_path, disks=2, size=4 * MiB) as pair:
            await pair.start(standby=["--buffer-memory", "16k", "--buffer-dir", str(place), "--buffer-format", kind])
            epoch = (await pair.primary.until(health="healthy"))["checkpoint"]["epoch"]
            for _ in range(8):
                await pair.write(300)  # 10 MB in all, of random places in 8 MiB
            status = await pair.primary.status()
            assert status["health"] == "healthy"
            assert status["checkpoint"]["epoch"] >= epoch + 3
            assert not [event for event in pair.standby.events if event["event"] == "REPLICATION_IO_ERROR"]
            await pair.checkpoint_shows()


@scenario
async def test_what_others_put_into_the_file_system_of_the_buffers_makes_a_checkpoint_due(tmp_path: Path) -> None:
    with small_file_system(tmp_path, 8 * MiB) as place:
        async with Pair(tmp_path, disks=2, size=4 * MiB) as pair:
            await pair.start("--max-stall", "200ms", standby=["--buffer-memory", "16k", "--buffer-dir", str(place)])
            epoch = (await pair.primary.until(health="healthy"))["checkpoint"]["epoch"]
            async with pair.primary.clients() as (guest, _):
                await guest.pwrite(0, b"!" * MiB)
            saved = await pair.standby.until(lambda status: status["disks"][0]["buffer-used"] == MiB)
            # An even share each of what is free, and what it holds already.
            assert [disk["buffer-limit"] for disk in saved["disks"]] == [
                pytest.approx(limit, abs=64 * KiB) for limit in (4.5 * MiB, 3.5 * MiB)]
            (place / "others").write_bytes(bytes(room(place) - MiB))
            await pair.primary.until(lambda status: status["checkpoint"]["epoch"] > epoch)
            assert (await pair.primary.status())["health"] == "healthy"
            assert (await pair.standby.status())["disks"][0]["buffer-used"] == 0


@scenario
async def test_buffers_that_are_images_and_have_filled_their_file_system_give_it_back_and_the_pair_recovers(
    tmp_path: Path,
) -> None:
    with small_file_system(tmp_path, 2 * MiB) as place:
        async with Pair(tmp_path, size=4 * MiB) as pair:
            await pair.start(standby=["--buffer-format", "qcow2", "--buffer-dir", str(place)])
            await pair.primary.until(health="healthy")
            async with pair.primary.clients() as (guest,):
                await guest.pwrite(0, b"!" * 3 * MiB)
                await pair.primary.execute("replication-checkpoint")
                await guest.write_zeroes(0, 3 * MiB)  # before it no checkpoint is due, and after it none can come
                await pair.primary.heard("REPLICATION_STATE", state="offline")
                await guest.pwrite(0, pair.originals[0].read_bytes()[:3 * MiB])
            await pair.primary.until(lambda status: status["health"] == "healthy" and room(place) > MiB)
            await pair.write(20)
            await pair.checkpoint()
            assert await pair.proven(pair.standby) == pair.writes.acknowledged
            assert (await pair.standby.status())["health"] == "healthy"


@scenario
async def test_what_the_standby_itself_wrote_takes_no_room_after_the_next_checkpoint(tmp_path: Path) -> None:
    """Nobody flushes the view after that."""
    with small_file_system(tmp_path, 3 * MiB) as place:
        async with Pair(tmp_path, size=4 * MiB) as pair:
            await pair.start(standby=["--buffer-format", "qcow2", "--buffer-dir", str(place)])
            await pair.primary.until(health="healthy")
            async with pair.standby.clients() as (client,):
                await client.pwrite(0, b"x" * 2 * MiB)
                assert room(place) < MiB
            await pair.primary.execute("replication-checkpoint")
            await pair.standby.until(lambda status: room(place) > 2 * MiB)


@scenario
async def test_a_standby_ends_in_good_order_without_room_for_the_metadata_of_its_buffers(tmp_path: Path) -> None:
    """They are images that nobody opens again."""
    async with Pair(tmp_path, size=MiB) as pair:
        await pair.start(standby=["--buffer-format", "qcow2", "--buffer-dir", str(tmp_path)])
        await pair.primary.until(health="healthy")
        async with pair.primary.clients() as (guest,):
            await guest.pwrite(0, b"!" * MiB)
            await pair.primary.until(lambda status: not status["disks"][0]["behind"])
        pair.primary.kill()
        limit_files(pair.standby, MiB)  # as long as the disk, and shorter than the image that has saved all of it
        pair.standby.send(signal.SIGTERM)
        assert await pair.standby.ended() == 0, pair.standby.printed
        assert await pair.file("standby") == pair.originals[0].read_bytes()


@pytest.mark.parametrize("ack", ["local", "both"])
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@scenario
async def test_the_file_system_of_a_primarys_disk_is_full_and_later_it_has_room_again(
    tmp_path: Path, kind: str, ack: str,
) -> None:
    with small_file_system(tmp_path, 2 * MiB) as place:
        async with Pair(tmp_path, size=4 * MiB, format=kind) as pair:
            file = tmp_path / "disk0.primary"
            await convert(Conversion([ImageName(str(file), kind)], ImageName(str(place / "disk"), kind)))
            file.unlink()
            file.symlink_to(place / "disk")
            await pair.start("--ack", ack)
            await pair.primary.until(health="healthy")
            async with pair.primary.clients() as (guest,):
                with pytest.raises(OSError, match="No space left"):
                    for offset in range(0, 4 * MiB, 64 * KiB):
                        await guest.pwrite(offset, b"!" * 64 * KiB)
                told = await pair.primary.heard("REPLICATION_IO_ERROR", disk="disk0")
                assert told["reason"] == f"{file}: No space left on device"
                status = await pair.primary.status()
                assert (status["state"], status["health"]) == ("replicating", "degraded")
                assert status["disks"][0]["reason"] == told["reason"]
                assert status["reason"] == f"disk 'disk0': {told['reason']}"
                await guest.pwrite(0, b"what has a place goes on")
                await pair.primary.execute("replication-checkpoint")
                assert (await pair.primary.status())["health"] == "degraded"  # of what came before nothing is known
                make_room(place)
                for offset in range(0, 4 * MiB, MiB):
                    await guest.pwrite(offset, b"?" * MiB)
                await guest.flush()
            events = len(pair.primary.events)
            await pair.primary.execute("replication-checkpoint")
            await pair.primary.heard("REPLICATION_STATE", since=events, health="healthy", state="replicating")
            assert (await pair.primary.status())["disks"][0]["reason"] == ""
            assert await pair.standby.read_disks() == await pair.primary.read_disks()


@scenario
async def test_the_primarys_disk_fails_and_the_guest_is_told(tmp_path: Path) -> None:
    async with Pair(tmp_path, size=4 * MiB) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        limit_files(pair.primary, 3 * MiB)
        async with pair.primary.clients() as (guest,):
            with pytest.raises(OSError):
                await guest.pwrite(3 * MiB + 4096, b"beyond")
            await guest.pwrite(MiB, b"within")
            assert bytes(await guest.pread(MiB, 6)) == b"within"
        await pair.primary.execute("replication-checkpoint")
        [found] = await pair.standby.read_disks()
        assert found[1].startswith(b"within")


@scenario
async def test_the_standbys_disk_fails_the_guest_goes_on_and_so_does_the_pair_when_it_is_well_again(
    tmp_path: Path,
) -> None:
    async with Pair(tmp_path, size=4 * MiB) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        async with pair.primary.clients() as (guest,):
            await guest.pwrite(3 * MiB, b"!" * 65536)  # what is there has been saved: the buffer is in nobody's way
            await pair.primary.until(lambda status: not status["disks"][0]["behind"])
            limit_files(pair.standby, 3 * MiB)
            await guest.pwrite(3 * MiB + 4096, b"beyond")
            lost = await pair.primary.heard("REPLICATION_STATE", state="offline", health="at-risk")
            assert "on the standby" in lost["reason"]
            await guest.pwrite(0, b"on and on")
            assert bytes(await guest.pread(3 * MiB + 4096, 6)) == b"beyond"
            file = str(tmp_path / "disk0.standby")
            assert file in (await pair.standby.heard("REPLICATION_IO_ERROR", disk="disk0"))["reason"]
            alone = await pair.standby.until(state="lost")  # it looks as if the primary had gone; why it has is here
            assert f"disk 'disk0': {file}: " in alone["reason"]
            assert file in alone["disks"][0]["reason"]
            synced = await pair.primary.until(lambda status: "disk 'disk0' on the standby: " in status["reason"])
            assert synced["state"] == "offline"
        assert await pair.proven(pair.standby) == 0
        limit_files(pair.standby, resource.RLIM_INFINITY)
        await pair.primary.until(health="healthy")
        assert (await pair.standby.status())["disks"][0]["reason"] == ""
        assert await pair.standby.read_disks() == await pair.primary.read_disks()


@scenario
async def test_a_checkpoint_that_the_standby_cannot_take_says_so_and_the_next_one_is_good(tmp_path: Path) -> None:
    """D4: all disks stay at the old point."""
    async with Pair(tmp_path, disks=2, size=4 * MiB) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        await pair.write(20)
        await pair.primary.until(lambda status: not any(disk["behind"] for disk in status["disks"]))
        limit_files(pair.standby, 3 * MiB)  # emptying the buffers takes a new file in memory, as long as the disk
        with pytest.raises(BlockstepError, match="cannot empty"):
            await pair.primary.execute("replication-checkpoint")
        limit_files(pair.standby, resource.RLIM_INFINITY)
        assert await pair.proven(pair.standby) == 0
        for side in (pair.primary, pair.standby):
            status = await side.status()
            assert status["health"] == "degraded"
            assert "cannot empty" in status["reason"]
        await pair.checkpoint()
        assert await pair.proven(pair.standby) == 20
        for side in (pair.primary, pair.standby):
            assert (await side.status())["health"] == "healthy"


@scenario
async def test_the_standbys_own_writes_fill_only_their_own_buffer(tmp_path: Path) -> None:
    async with Pair(tmp_path, size=4 * MiB) as pair:
        await pair.start(standby=["--buffer-memory", "256k"])
        await pair.primary.until(health="healthy")
        async with pair.standby.clients() as (client,):
            with pytest.raises(OSError, match="No space"):
                await client.pwrite(0, b"x" * MiB)
            await asyncio.wait_for(pair.write(20), 5)
            await pair.primary.execute("replication-checkpoint")
            await client.pwrite(0, b"x" * 128 * KiB)
        assert (await pair.primary.status())["health"] == "healthy"
