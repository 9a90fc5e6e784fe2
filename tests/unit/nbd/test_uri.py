"""NBD URIs: what the document says, both ways, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstep.errors import OptionError
from blockstep.nbd.uri import InetAddress, NbdUri, UnixAddress, parse_address, parse_uri

LOCAL = InetAddress("example.com")


@pytest.mark.parametrize(("text", "uri"), [
    ("nbd://example.com/disk", NbdUri(LOCAL, "disk")),
    ("nbd://example.com/", NbdUri(LOCAL)),
    ("nbd://example.com", NbdUri(LOCAL)),
    ("nbd://example.com//disk", NbdUri(LOCAL, "/disk")),
    ("nbd://example.com/a/b", NbdUri(LOCAL, "a/b")),
    ("nbd://example.com/hello%20world", NbdUri(LOCAL, "hello world")),
    ("nbd://example.com/a+b%2Bc", NbdUri(LOCAL, "a+b+c")),
    ("nbd://example.com/%C3%A9", NbdUri(LOCAL, "é")),
    ("NBDS://example.com:10810/x", NbdUri(InetAddress("example.com", 10810), "x", tls=True)),
    ("nbd://[::1]:1234/x", NbdUri(InetAddress("::1", 1234), "x")),
    ("nbd://[fe80::1%25eth0]/", NbdUri(InetAddress("fe80::1%eth0"))),
    ("nbd:///x", NbdUri(InetAddress("localhost"), "x")),
    ("nbd://", NbdUri(InetAddress("localhost"))),
    ("nbd://:99/x", NbdUri(InetAddress("localhost", 99), "x")),
    ("nbds://alice@example.com/?tls-psk-file=/k",
     NbdUri(LOCAL, tls=True, username="alice", tls_psk_file="/k")),
    ("nbd+unix:///disk?socket=nbd.sock", NbdUri(UnixAddress("nbd.sock"), "disk")),
    ("nbd+unix:///?socket=%2Frun%2Fa%20b", NbdUri(UnixAddress("/run/a b"))),
    ("nbd+unix:///?socket=%00/abstract", NbdUri(UnixAddress("\0/abstract"))),
    ("nbds+unix:///?socket=/s&tls-hostname=h&tls-verify-peer=0&tls-certificates=/pki&tls-type=x509",
     NbdUri(UnixAddress("/s"), tls=True, tls_hostname="h", tls_verify_peer=False, tls_certificates="/pki",
            tls_type="x509")),
])
def test_parses(text: str, uri: NbdUri) -> None:
    assert parse_uri(text) == uri
    assert parse_uri(str(uri)) == uri


@pytest.mark.parametrize(("text", "hint"), [
    ("", "an NBD URI"),
    ("example.com", "an NBD URI"),
    ("http://example.com/", "nbd://"),
    ("nbd+vsock://1/", "nbd://"),
    ("nbd:disk", "'//'"),
    ("nbd://example.com/a#b", "%23"),
    ("nbd://example.com/%zz", "hexadecimal"),
    ("nbd://example.com/%ff", "UTF-8"),
    ("nbd://example.com/a%00b", "NUL"),
    ("nbd://example.com/" + "x" * 4097, "4096"),
    ("nbd://example.com:0/", "port"),
    ("nbd://example.com:65536/", "port"),
    ("nbd://example.com:http/", "authority"),
    ("nbd://::1/", "authority"),
    ("nbd://[example]/", "IPv6"),
    ("nbd://example.com/?socket=/s", "nbd+unix"),
    ("nbd+unix:///", "socket=PATH"),
    ("nbd+unix:///?socket=", "socket=PATH"),
    ("nbd+unix:///?socket", "one value for socket"),
    ("nbd+unix:///?socket=a&socket=b", "one value for socket"),
    ("nbd+unix:///?socket=a%00b", "NUL"),
    ("nbd+unix://host/?socket=a", "without user, host"),
    ("nbd://example.com/?tls-verify-peer=maybe", "0 or 1"),
    ("nbd://example.com/?tls-type=ssl3", "x509"),
    ("nbd://example.com/?retries=3", "no other parameters"),
])
def test_refuses_and_says_what_is_right(text: str, hint: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_uri(text, "server")
    assert caught.value.option == "server"
    assert hint in caught.value.expected


@given(st.text())
def test_any_text_is_a_uri_or_an_option_error(text: str) -> None:
    for candidate in (text, "nbd://" + text, "nbd+unix:///?socket=" + text):
        try:
            uri = parse_uri(candidate)
        except OptionError:
            continue
        assert parse_uri(str(uri)) == uri


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)


@given(export=names, host=names.filter(lambda t: not set(t) & set("[]:@")) | st.just("::1"),
       port=st.integers(1, 65535), tls=st.booleans(), hostname=st.none() | names)
def test_every_value_survives_the_round_trip(
        export: str, host: str, port: int, tls: bool, hostname: str | None) -> None:
    uri = NbdUri(InetAddress(host or "localhost", port), export, tls, tls_hostname=hostname)
    assert parse_uri(str(uri)) == uri


@given(path=names.filter(bool), export=names)
def test_every_socket_path_survives_the_round_trip(path: str, export: str) -> None:
    for text in (path, "\0" + path):
        uri = NbdUri(UnixAddress(text), export)
        assert parse_uri(str(uri)) == uri


@pytest.mark.parametrize(("text", "address", "shown"), [
    ("host:1", InetAddress("host", 1), "host:1"),
    ("host", InetAddress("host", 10809), "host:10809"),
    ("[::1]:5", InetAddress("::1", 5), "[::1]:5"),
    (":0", InetAddress("", 0), ":0"),
    ("/run/s", UnixAddress("/run/s"), "/run/s"),
    ("unix:s", UnixAddress("s"), "s"),
    ("@abstract", UnixAddress("\0abstract"), "@abstract"),
])
def test_addresses(text: str, address: InetAddress | UnixAddress, shown: str) -> None:
    assert parse_address(text) == address
    assert str(address) == shown


@pytest.mark.parametrize("text", ["", "host:", "host:x", "::1", "a@b", "host:65536", "unix:", "@"])
def test_bad_addresses_are_refused(text: str) -> None:
    with pytest.raises(OptionError):
        parse_address(text, "listen")
