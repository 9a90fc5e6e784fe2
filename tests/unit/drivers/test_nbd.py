"""The options of driver ``nbd``: which are refused, and how."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from blockstep.block.registry import parse_options
from blockstep.drivers.nbd import Nbd
from blockstep.errors import BlockstepError, OptionError


def node(**options: Any) -> Nbd:
    driver, parsed = parse_options({"driver": "nbd", **{key.replace("_", "-"): value
                                                        for key, value in options.items()}})
    assert driver is Nbd
    return Nbd("disk", parsed)


@pytest.mark.parametrize(("options", "hint"), [
    ({}, "given once"),
    ({"host": "h", "path": "/p"}, "given once"),
    ({"uri": "nbd://h/", "server": {"type": "unix", "path": "/p"}}, "given once"),
    ({"path": "/p", "port": 10809}, "together with host"),
    ({"host": "h", "port": "http"}, "port number"),
    ({"server": {"type": "inet", "host": "h", "port": "70000"}}, "port number"),
    ({"server": {"type": "vsock", "cid": 3}}, "inet, unix, fd"),
    ({"server": {"type": "fd", "str": "none"}}, "file descriptor"),
    ({"uri": "nbd+unix:///"}, "socket=PATH"),
    ({"uri": "nbds://h/?tls-psk-file=/k"}, "X.509"),
    ({"path": "/p", "tls-hostname": "h"}, "tls-creds"),
    ({"path": "/p", "tls-creds": "/nowhere"}, ""),
    ({"path": "/p", "connections": 0}, "1 to 16"),
    ({"path": "/p", "timeout": -1.0}, "0 or more"),
])
def test_wrong_options_are_refused_by_name(options: dict[str, Any], hint: str) -> None:
    with pytest.raises(OptionError) as caught:
        asyncio.run(node(**options).open())
    assert hint in caught.value.expected


def test_a_server_that_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        asyncio.run(node(path=str(tmp_path / "nowhere")).open())


@pytest.mark.parametrize("name", ["a..b", ".b", "x" * 64])
def test_what_can_be_no_host_name_is_called_that(name: str) -> None:
    with pytest.raises(OSError, match=f"'{name}': it is no host name"):
        asyncio.run(node(host=name).open())


def test_every_error_of_open_is_ours_or_the_systems() -> None:
    with pytest.raises((OSError, BlockstepError)):
        asyncio.run(node(host="localhost", port=1).open())
