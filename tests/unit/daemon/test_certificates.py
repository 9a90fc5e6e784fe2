"""When it is told that certificates expire."""

from __future__ import annotations

import asyncio
import datetime
from pathlib import Path

from blockstep.daemon import certificates as module
from blockstep.daemon.certificates import Certificates, of_client, of_server
from blockstep.nbd.certificate import validity
from tests import certificates

DAY = 86400.0


def told(keys: Path, at: float) -> list[str]:
    return asyncio.run(Certificates([*of_client(keys), *of_server(keys)], lambda: at).look())


def test_it_is_told_before_and_afterwards_of_each_file_once(tmp_path: Path) -> None:
    keys = certificates.make(tmp_path / "keys", "server", left=datetime.timedelta(days=899))
    begin, end = validity(keys / "server-cert.pem")
    assert end - begin == 900 * DAY
    (keys / "ca-cert.pem").unlink()
    assert told(keys, end - module.EARLY - 1) == []
    [soon] = told(keys, end - module.EARLY + 1)
    assert soon.startswith(f"the certificate {keys / 'server-cert.pem'} expires on 20")
    assert told(keys, end + 1) == [soon.replace("expires", "expired")]


def test_of_one_that_is_short_lived_a_tenth_counts(tmp_path: Path) -> None:
    keys = certificates.make(tmp_path / "keys", "client", left=datetime.timedelta(days=9))
    end = validity(keys / "client-cert.pem")[1]
    (keys / "ca-cert.pem").unlink()
    assert told(keys, end - 1.1 * DAY) == []
    assert len(told(keys, end - 0.9 * DAY)) == 1


def test_without_tls_and_of_files_that_cannot_be_read_nothing_is_told(tmp_path: Path) -> None:
    assert of_client(None) == of_server(None) == []
    assert told(tmp_path, 1e12) == []
