"""object-add and object-del: what is made, what is refused, and who may still use what is gone."""

from __future__ import annotations

import base64
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from blockstep.drivers.throttle import Limits, Throttle
from blockstep.errors import OptionError
from tests import certificates
from tests.daemon import Daemon, daemon, refused
from tests.scenarios import scenario


def ids(d: Daemon) -> list[str]:
    return [each.id for each in d.inventory.objects]


@scenario
async def test_a_secret_is_text_or_base64_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"\0from a file\n")
    async with daemon(tmp_path) as d:
        for arguments, expected in (
                ({"data": "plain"}, b"plain"),
                ({"data": base64.b64encode(b"\xff\0").decode(), "format": "base64"}, b"\xff\0"),
                ({"file": str(tmp_path / "secret")}, b"\0from a file\n")):
            await d.qmp("object-add", {"qom-type": "secret", "id": "s", **arguments})
            assert d.inventory.objects.secret("s") == expected
            await d.qmp("object-del", id="s")
            with pytest.raises(OptionError):
                d.inventory.objects.secret("s")


@scenario
async def test_a_secret_is_in_no_message(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await d.qmp("object-add", {"qom-type": "secret", "id": "s", "data": "hunter2"})
        assert "hunter2" not in repr(d.inventory.graph.objects)


@pytest.mark.parametrize(("arguments", "names"), [
    ({"qom-type": "secret", "id": "s"}, "data"),
    ({"qom-type": "secret", "id": "s", "data": "a", "file": "b"}, "file"),
    ({"qom-type": "secret", "id": "s", "data": "!", "format": "base64"}, "format"),
    ({"qom-type": "secret", "id": "s", "data": "a", "format": "hex"}, "format"),
    ({"qom-type": "secret", "id": "s", "data": "a", "keyid": "k"}, "keyid"),
    ({"qom-type": "secret", "id": "s", "data": "a", "iv": "k"}, "iv"),
    ({"qom-type": "secret", "id": "s", "file": "/nonexistent"}, "/nonexistent"),
    ({"qom-type": "secret", "id": "s", "data": "a", "size": 1}, "size"),
    ({"qom-type": "secret", "id": "1s", "data": "a"}, "id"),
    ({"qom-type": "secret", "data": "a"}, "id"),
    ({"qom-type": "secret", "id": "old", "data": "a"}, "id"),
    ({"qom-type": "iothread", "id": "s"}, "qom-type"),
    ({"id": "s"}, "qom-type"),
    ({"qom-type": "tls-creds-x509", "id": "s"}, "dir"),
    ({"qom-type": "tls-creds-x509", "id": "s", "dir": "/nonexistent"}, "dir"),
    ({"qom-type": "tls-creds-x509", "id": "s", "dir": "/", "endpoint": "both"}, "endpoint"),
    ({"qom-type": "tls-creds-x509", "id": "s", "dir": "/", "priority": "SECURE256"}, "priority"),
    ({"qom-type": "tls-creds-x509", "id": "s", "dir": "/", "passwordid": "nobody"}, "passwordid"),
    ({"qom-type": "throttle-group", "id": "s", "limits": {"iops-total": 1, "iops-read": 1}}, "iops-total"),
    ({"qom-type": "throttle-group", "id": "s", "limits": {"iops": 1}}, "iops"),
    ({"qom-type": "throttle-group", "id": "s", "x-bps-read": -1}, "bps-read"),
    ({"qom-type": "throttle-group", "id": "s", "x-bps-read": "1"}, "x-bps-read"),
])
def test_a_wrong_property_is_named_and_nothing_is_made(tmp_path: Path, arguments: dict[str, Any], names: str) -> None:
    @scenario
    async def check() -> None:
        async with daemon(tmp_path) as d:
            await d.qmp("object-add", {"qom-type": "secret", "id": "old", "data": "b"})
            with refused("GenericError", names):
                await d.qmp("object-add", arguments)
            assert ids(d) == ["old"]
            assert d.inventory.objects.secret("old") == b"b"

    check()


@scenario
async def test_credentials_are_of_one_endpoint(tmp_path: Path) -> None:
    folder = certificates.make(tmp_path / "pki", "server", "client")
    async with daemon(tmp_path) as d:
        for endpoint, verify in (("server", True), ("server", False), ("client", True), ("client", False)):
            await d.qmp("object-add", {"qom-type": "tls-creds-x509", "id": "tls", "dir": str(folder),
                                       "endpoint": endpoint, "verify-peer": verify})
            context = d.inventory.objects.tls("tls", endpoint).context()  # type: ignore[arg-type]
            assert (context.verify_mode is ssl.CERT_REQUIRED) == verify
            with pytest.raises(OptionError, match="endpoint"):
                d.inventory.objects.tls("tls", "client" if endpoint == "server" else "server")
            await d.qmp("object-del", id="tls")
        await d.qmp("object-add", {"qom-type": "secret", "id": "tls", "data": "x"})
        with pytest.raises(OptionError, match="tls-creds-x509"):
            d.inventory.objects.tls("tls", "server")


@scenario
async def test_a_password_opens_the_private_key(tmp_path: Path) -> None:
    folder = certificates.make(tmp_path / "pki", "server")
    key = serialization.load_pem_private_key((folder / "server-key.pem").read_bytes(), None)
    (folder / "server-key.pem").write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"open")))
    options = {"qom-type": "tls-creds-x509", "id": "tls", "dir": str(folder), "endpoint": "server"}
    async with daemon(tmp_path) as d:
        await d.qmp("object-add", {"qom-type": "secret", "id": "right", "data": "open"})
        await d.qmp("object-add", {"qom-type": "secret", "id": "wrong", "data": "shut"})
        with refused("GenericError", "unencrypted key"):
            await d.qmp("object-add", options)
        with refused("GenericError", "password"):
            await d.qmp("object-add", {**options, "passwordid": "wrong"})
        await d.qmp("object-add", {**options, "passwordid": "right"})
        assert ids(d) == ["right", "wrong", "tls"]


@scenario
async def test_nodes_keep_to_the_limits_of_a_group_which_stays_while_they_do(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await d.qmp("object-add", {"qom-type": "throttle-group", "id": "g",
                                   "limits": {"iops-total": 10}, "x-iops-total": 20, "x-bps-read": 30})
        graph = d.inventory.graph
        options = {"driver": "throttle", "throttle-group": "g", "file": {"driver": "null"}}
        nodes = [await graph.open({**options, "node-name": name}) for name in ("a", "b")]
        assert isinstance(nodes[0], Throttle)
        assert isinstance(nodes[1], Throttle)
        assert nodes[0].group is nodes[1].group
        assert nodes[0].group.limits == Limits(iops_total=10, bps_read=30)
        with refused("GenericError", "in use by 2 nodes"):
            await d.qmp("object-del", id="g")
        for node in nodes:
            await graph.close(node)
        assert ids(d) == ["g"]  # other than a group that nodes have made, it does not go with them
        await d.qmp("object-del", id="g")
        with pytest.raises(OptionError, match="throttle-group"):
            await graph.open(options)


@scenario
async def test_only_objects_can_be_taken_away(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        node = await d.inventory.graph.open({"driver": "throttle", "throttle-group": "g", "node-name": "n",
                                             "limits": {"iops-total": 1}, "file": {"driver": "null"}})
        for id in ("g", "n", "nobody"):
            with refused("GenericError", id):
                await d.qmp("object-del", id=id)
        with refused("GenericError", "id"):
            await d.qmp("object-add", {"qom-type": "throttle-group", "id": "g"})
        await d.inventory.graph.close(node)
