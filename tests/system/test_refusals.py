"""A primary that does not fit is refused with one clear error; and nobody speaks to a TLS pair without TLS."""

from __future__ import annotations

import asyncio
import base64
import datetime
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from blockstep.errors import BlockstepError
from blockstep.nbd.client import Client
from blockstep.nbd.uri import parse_address
from blockstep.qmp.client import Connection, open_connection
from blockstep.testing.pair import Pair, Side
from blockstep.testing.proxy import Proxy
from blockstep.units import MiB
from tests import certificates
from tests.scenarios import scenario


async def other_primary(pair: Pair, directory: Path, disks: dict[str, str] | None = None, name: str = "test") -> Side:
    directory.mkdir()
    images = {name: str(directory / Path(path).name) for name, path in pair.disks("primary").items()}
    for path, image in zip(pair.disks("primary").values(), images.values(), strict=True):
        shutil.copyfile(path, image)
    side = await Side.start("primary", directory, disks or images, "--pair", name, "--standby", pair.link)
    pair.sides.append(side)
    return side


@scenario
async def test_a_second_primary_is_refused_and_disturbs_nobody(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        second = await other_primary(pair, tmp_path / "second")
        status = await second.until(lambda status: "another primary" in status["reason"])
        assert (status["state"], status["health"]) == ("offline", "at-risk")
        async with pair.writing():
            await pair.written(50)
            await pair.checkpoint_shows()
        assert (await pair.primary.status())["health"] == "healthy"


@asynccontextmanager
async def attached(pair: Pair, instance: str) -> AsyncIterator[tuple[Connection, dict[str, Any]]]:
    """A primary that presents itself and does no more than it is told."""
    host, _, port = pair.link.rpartition(":")
    control = await open_connection((host, int(port) + 1))
    try:
        yield control, await control.execute("pair-attach", {
            "pair": "test", "instance": instance, "disks": [{"name": "disk0", "size": MiB}]})
    finally:
        await control.close()


@scenario
async def test_a_second_primary_is_refused_during_the_first_sync_as_well(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start_standby()
        async with attached(pair, "first") as (control, _):
            with pytest.raises(BlockstepError, match="another primary"):
                async with attached(pair, "second"):
                    pass
            await control.execute("pair-checkpoint", {"epoch": 1})


@pytest.mark.parametrize(("change", "error"), [
    ({"prefix": "another"}, "only the primary that is attached"),
    ({"disk": "other"}, "only the primary that is attached"),
    ({"offset": 512}, r"offset, length: '512, 65536' is not valid"),
    ({"length": 65537}, "is not valid; it should be a part of the disk's 1048576 bytes"),
    ({"offset": MiB}, "is not valid; it should be a part of the disk's 1048576 bytes"),
    ({"length": 0}, "'length' must be an integer >= 1"),
    ({"key": "c2hvcnQ="}, "'key' must be "),
    ({"key": "no base64!"}, "'key'"),
])
@scenario
async def test_whoever_asks_for_digests_and_may_not_is_told_why(
    tmp_path: Path, change: dict[str, Any], error: str
) -> None:
    async with Pair(tmp_path) as pair:
        standby = await pair.start_standby()
        async with attached(pair, "first") as (control, answer):
            question = {"prefix": answer["prefix"], "disk": "disk0", "offset": 0, "length": 65536,
                        "key": base64.b64encode(bytes(16)).decode()}
            assert await control.execute("pair-digests", question) == {"zeroes": 65536, "digests": ""}
            with pytest.raises(BlockstepError, match=error):
                await control.execute("pair-digests", {**question, **change})
            assert (await standby.status())["state"] == "syncing"


@scenario
async def test_a_primary_whose_disk_another_one_may_have_written_to_copies_everything(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        standby = await pair.start_standby()
        async with attached(pair, "first") as (control, _):
            await control.execute("pair-checkpoint", {"epoch": 1})
        await standby.until(state="lost")
        async with attached(pair, "first") as (_, answer):
            assert (answer["instance"], answer["running"]) == ("first", True)
        await standby.until(state="lost")
        async with attached(pair, "second") as (_, answer):
            assert answer["instance"] != "second"
        await standby.until(state="lost")
        async with attached(pair, "first") as (_, answer):
            assert answer["instance"] != "first"


@pytest.mark.parametrize(("change", "error"), [
    ("size", r"size of disk 'disk0': 524288 is not valid; it should be 1048576 bytes"),
    ("name", r"disks: 'other' is not valid; it should be those of this standby: disk0"),
    ("more", r"disks: 'disk0, disk1' is not valid"),
    ("pair", r"pair: 'elsewhere' is not valid; it should be 'test'"),
])
@scenario
async def test_a_primary_that_does_not_fit_says_why(tmp_path: Path, change: str, error: str) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start_standby()
        paths = {name: tmp_path / f"{name}.image" for name in ("disk0", "disk1", "other")}
        for path in paths.values():
            with open(path, "wb") as file:
                file.truncate(MiB // 2 if change == "size" else MiB)
        names = {"size": ["disk0"], "name": ["other"], "more": ["disk0", "disk1"], "pair": ["disk0"]}[change]
        primary = await other_primary(pair, tmp_path / "other", {name: str(paths[name]) for name in names},
                                      "elsewhere" if change == "pair" else "test")
        status = await primary.until(lambda status: "refuses" in status["reason"])
        with pytest.raises(AssertionError, match=error):
            raise AssertionError(status["reason"])
        assert status["state"] == "offline"
        assert (await pair.standby.status())["state"] == "waiting"
        reports = [event for event in primary.events if event["event"] == "REPLICATION_STATE"
                   and "refuses" in event["data"]["reason"]]
        assert len(reports) <= 1, "one error, told once"


@scenario
async def test_a_pair_over_tls(tmp_path: Path) -> None:
    keys = certificates.make(tmp_path / "keys", "server", "client", host="127.0.0.1")
    async with Pair(tmp_path) as pair:
        await pair.start("--tls", str(keys), standby=["--tls", str(keys)])
        await pair.primary.until(health="healthy")
        async with pair.writing():
            await pair.written(100)
            await pair.checkpoint_shows()
        await plain_is_refused(pair)
        assert (await pair.primary.status())["health"] == "healthy"


async def plain_is_refused(pair: Pair) -> None:
    """Neither port of the link speaks to somebody without TLS."""
    address: Any = parse_address(pair.link)
    with pytest.raises((BlockstepError, OSError)):
        await Client.connect(address, "disk0")
    with pytest.raises((BlockstepError, OSError)):
        await open_connection((address.host, address.port + 1), timeout=0.5)


@scenario
async def test_certificates_that_expire_are_told_and_renewed_ones_are_taken_without_a_restart(tmp_path: Path) -> None:
    hour = datetime.timedelta(hours=1)
    keys = certificates.make(tmp_path / "keys", "server", "client", host="127.0.0.1", left=hour)
    renewed = certificates.make(tmp_path / "renewed", "server", "client", host="127.0.0.1")
    async with Pair(tmp_path) as pair:
        await pair.start_standby("--tls", str(keys))
        host, _, port = pair.link.rpartition(":")
        async with Proxy(host, int(port)) as proxy:
            await pair.start_primary("--tls", str(keys), to=proxy.address)
            for side, name in ((pair.primary, "client"), (pair.standby, "server")):
                status = await side.until(state="replicating", health="degraded")
                assert status["reason"].startswith(f"the certificate {keys / name}-cert.pem expires on ")
                await side.heard("REPLICATION_STATE", reason=status["reason"])
            for file in renewed.iterdir():
                shutil.copyfile(file, keys / file.name)
            events = len(pair.primary.events)
            proxy.cut()
            await pair.primary.heard("REPLICATION_STATE", since=events, state="offline")
            for side in (pair.primary, pair.standby):
                await side.until(state="replicating", health="healthy")
            async with pair.writing():
                await pair.written(20)
                await pair.checkpoint_shows()


@pytest.mark.parametrize("stranger", ["plain", "other CA"])
@scenario
async def test_a_primary_without_the_right_certificate_is_refused(tmp_path: Path, stranger: str) -> None:
    keys = certificates.make(tmp_path / "keys", "server", "client", host="127.0.0.1")
    others = certificates.make(tmp_path / "others", "server", "client", host="127.0.0.1")
    shutil.copyfile(keys / "ca-cert.pem", others / "ca-cert.pem")  # it trusts the standby, not the other way round
    async with Pair(tmp_path) as pair:
        await pair.start_standby("--tls", str(keys))
        await pair.start_primary("--max-stall", "500ms", *([] if stranger == "plain" else ["--tls", str(others)]))
        status = await pair.primary.until(lambda status: status["reason"] != "not attached yet")
        assert (status["state"], status["health"]) == ("offline", "at-risk")
        assert (await pair.standby.status())["state"] == "waiting"
        async with pair.writing():
            await asyncio.wait_for(pair.written(20), 5)
