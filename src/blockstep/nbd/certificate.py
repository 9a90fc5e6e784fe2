"""For how long a certificate is valid: the one thing about our own that nobody else tells us before it is too late.

    Certificate ─► TBSCertificate: [0] version, serial, algorithm, issuer, validity: (notBefore, notAfter), ...

Connections that stand outlive their certificates, and only the next handshake fails. Python's `ssl` shows the dates of
the peer's certificate, not those of the own one. So they are read from the file: PEM around DER, of which no more is
understood than the way to the dates.

Source: RFC 5280, section 4.1.
"""

from __future__ import annotations

import datetime
import os
import ssl
from typing import Final

_SEQUENCE: Final = 0x30
_VERSION: Final = 0xA0
#: How the years of a date are written, by its tag: with two digits up to 2049, with four from then on.
_DATES: Final = {0x17: 2, 0x18: 4}
_END: Final = "-----END CERTIFICATE-----"
_BEGIN: Final = "-----BEGIN CERTIFICATE-----"


def validity(path: str | os.PathLike[str]) -> tuple[float, float]:
    """From when to when the first certificate of a file is valid, in seconds since 1970.

    Raises OSError, and ValueError for a file that holds no certificate.
    """
    with open(path, encoding="ascii", errors="replace") as file:
        text = file.read()
    begin = text.find(_BEGIN)
    end = text.find(_END, begin)
    if begin < 0 or end < 0:
        raise ValueError(f"{os.fspath(path)} holds no certificate")
    try:
        return _validity(ssl.PEM_cert_to_DER_cert(text[begin:end + len(_END)]))
    except (IndexError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} holds no certificate that can be understood") from error


def _validity(der: bytes) -> tuple[float, float]:
    at = _into(der, _into(der, 0))
    if der[at] == _VERSION:
        at = _after(der, at)
    for _ in ("serial", "algorithm", "issuer"):
        at = _after(der, at)
    at = _into(der, at)
    return _date(der, at), _date(der, _after(der, at))


def _element(der: bytes, at: int) -> tuple[int, int]:
    """Where the content of the element at ``at`` begins and ends."""
    length, begin = der[at + 1], at + 2
    if length & 0x80:
        begin, length = begin + (length & 0x7F), int.from_bytes(der[begin:begin + (length & 0x7F)], "big")
    return begin, begin + length


def _into(der: bytes, at: int) -> int:
    if der[at] != _SEQUENCE:
        raise ValueError("no sequence")
    return _element(der, at)[0]


def _after(der: bytes, at: int) -> int:
    return _element(der, at)[1]


def _date(der: bytes, at: int) -> float:
    begin, end = _element(der, at)
    digits, text = _DATES.get(der[at], 0), der[begin:end].decode("ascii")
    if not digits or not text.endswith("Z"):
        raise ValueError("no date")
    if digits == 2:
        text = ("20" if text < "50" else "19") + text
    return datetime.datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=datetime.UTC).timestamp()
