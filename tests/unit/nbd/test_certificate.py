"""For how long certificates are valid, as another library reads them; and files that hold none."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from cryptography import x509

from blockstep.nbd.certificate import validity
from tests import certificates


@pytest.mark.parametrize("left", [datetime.timedelta(days=-1, seconds=5), datetime.timedelta(hours=1),
                                  datetime.timedelta(days=20_000)], ids=["expired", "soon", "after 2050"])
def test_the_dates_are_those_that_were_given(tmp_path: Path, left: datetime.timedelta) -> None:
    keys = certificates.make(tmp_path / "keys", "server", "client", left=left)
    for path in keys.glob("*-cert.pem"):
        known = x509.load_pem_x509_certificate(path.read_bytes())
        assert validity(path) == (known.not_valid_before_utc.timestamp(), known.not_valid_after_utc.timestamp())


def test_the_first_of_several_counts_and_text_around_it_does_not(tmp_path: Path) -> None:
    keys = certificates.make(tmp_path / "keys", "server", left=datetime.timedelta(hours=1))
    chain = tmp_path / "chain.pem"
    chain.write_text("Subject: é\n" + (keys / "server-cert.pem").read_text() + (keys / "ca-cert.pem").read_text())
    assert validity(chain) == validity(keys / "server-cert.pem") != validity(keys / "ca-cert.pem")


def test_a_file_without_a_certificate_is_named(tmp_path: Path) -> None:
    keys = certificates.make(tmp_path / "keys", "server")
    with pytest.raises(ValueError, match="server-key"):
        validity(keys / "server-key.pem")
    lines = (keys / "ca-cert.pem").read_text().splitlines()
    for kept in (1, 2, 3):
        (tmp_path / "short").write_text("\n".join([*lines[:kept], lines[-1]]))
        with pytest.raises(ValueError, match="short"):
            validity(tmp_path / "short")
