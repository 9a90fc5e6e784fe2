"""Objects: what is neither disk nor job and is referred to by id. Of QEMU's types these are here:

    secret           a password, or what else must not stand in a command line; other objects name it
    tls-creds-x509   certificates: who we are, and whose peers we take; NBD servers, NBD clients and monitors name it
    throttle-group   limits that several throttle nodes keep together

An object never changes while it is here. Whoever has got hold of credentials keeps them when the object goes;
a throttle group stays for as long as a node keeps to it.

Source: the object types of QEMU's QAPI reference (``object-add``), for names and properties.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast

import msgspec
from msgspec import UNSET, Meta, UnsetType

from blockstep.block.graph import Graph
from blockstep.block.names import check_name
from blockstep.drivers.throttle import Limits, ThrottleGroup
from blockstep.errors import BlockstepError, OptionError
from blockstep.nbd.tls import TlsCredentials


class ObjectOptions(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True, tag_field="qom-type"):
    """What all types have."""

    id: Annotated[str, Meta(description="Its name: letters, digits, '-', '.' and '_', beginning with a letter.")]


class SecretOptions(ObjectOptions, tag="secret"):
    """Either ``data`` or ``file``."""

    data: Annotated[str | None, Meta(description="The secret itself.")] = None
    file: Annotated[str | None, Meta(description="The file that has it.")] = None
    format: Annotated[Literal["raw", "base64"], Meta(description="How it is written: as it is (UTF-8), or in base64.")
                      ] = "raw"
    keyid: Annotated[str | None, Meta(description="Refused: secrets are not encrypted here.")] = None
    iv: Annotated[str | None, Meta(description="Refused: secrets are not encrypted here.")] = None


class TlsCredsX509Options(ObjectOptions, tag="tls-creds-x509"):
    """A directory of X.509 files."""

    dir: Annotated[str | None, Meta(
        description="The directory: ca-cert.pem, and server-cert.pem and server-key.pem, or client-cert.pem and "
                    "client-key.pem. Required.")] = None
    endpoint: Annotated[Literal["client", "server"], Meta(description="Which end of a connection they are for.")
                        ] = "client"
    verify_peer: Annotated[bool, Meta(description="The peer needs a certificate that the CA has signed.")] = True
    passwordid: Annotated[str | None, Meta(description="The secret that opens the private key.")] = None
    sanity_check: Annotated[bool, Meta(description="Taken, and of no effect: the files are always checked.")] = True
    priority: Annotated[str | None, Meta(
        description="Of GnuTLS, which is not used here: NORMAL, or left out.")] = None


#: ``x-iops-total`` and the like: the limits one by one, as they were written before there was ``limits``.
_FLAT: Final = {f"x_{name}": name for name in Limits.__struct_fields__}


class ThrottleGroupLimits(ObjectOptions):
    """The limits of a group, in one piece."""

    limits: Annotated[Limits | None, Meta(description="The limits, as those of the driver throttle.")] = None


ThrottleGroupOptions = msgspec.defstruct(
    "ThrottleGroupOptions",
    [(flat, Annotated[int | UnsetType, Meta(description=f"As limits.{name.replace('_', '-')}.")], UNSET)
     for flat, name in _FLAT.items()],
    bases=(ThrottleGroupLimits,), module=__name__, kw_only=True, rename="kebab", forbid_unknown_fields=True,
    tag_field="qom-type", tag="throttle-group", namespace={"__doc__": "Limits, together or one by one."})

#: The type of each object, and what it is made of.
TYPES: Final[dict[str, type[ObjectOptions]]] = {
    "secret": SecretOptions,
    "throttle-group": cast("type[ObjectOptions]", ThrottleGroupOptions),
    "tls-creds-x509": TlsCredsX509Options,
}


class Secret(msgspec.Struct, frozen=True):
    """The bytes of a secret, which no message shows."""

    data: bytes

    def __repr__(self) -> str:
        return "Secret(...)"


class Objects:
    """The objects of an inventory, by id; its graph sees them as `Graph.objects`. Make it in a running event loop."""

    def __init__(self, graph: Graph) -> None:
        self._values = graph.objects
        self._options: dict[str, ObjectOptions] = {}

    def __iter__(self) -> Iterator[ObjectOptions]:
        return iter([*self._options.values()])

    def add(self, options: ObjectOptions) -> None:
        """Make an object. Raises OptionError that names the property; OSError for a file that cannot be read."""
        check_name("id", options.id)
        if options.id in self._values:
            raise OptionError("id", options.id, "an id that nothing else has")
        self._values[options.id] = self._make(options)
        self._options[options.id] = options

    def remove(self, id: str) -> None:
        """Take an object away. Raises OptionError if there is none; BlockstepError if it is in use."""
        if id not in self._options:
            raise OptionError("id", id, "the id of an object")
        value = self._values[id]
        if isinstance(value, ThrottleGroup):
            if value.members > 1:
                raise BlockstepError(f"object '{id}' is in use by {value.members - 1} nodes")
            value.members = 0
        del self._values[id], self._options[id]

    def tls(self, id: str, endpoint: Literal["client", "server"]) -> TlsCredentials:
        """The TLS credentials of that id. Raises OptionError if there are none, or for the other endpoint."""
        value = self._values.get(id)
        if not isinstance(value, TlsCredentials):
            raise OptionError("tls-creds", id, "the id of an object of type tls-creds-x509")
        if value.endpoint != endpoint:
            raise OptionError("tls-creds", id, f"the id of credentials with endpoint={endpoint}")
        return value

    def secret(self, id: str, option: str = "secret") -> bytes:
        """The bytes of a secret. Raises OptionError that names ``option``."""
        value = self._values.get(id)
        if not isinstance(value, Secret):
            raise OptionError(option, id, "the id of an object of type secret")
        return value.data

    def _make(self, options: ObjectOptions) -> Any:
        if isinstance(options, SecretOptions):
            return _secret(options)
        if isinstance(options, TlsCredsX509Options):
            return self._credentials(options)
        assert isinstance(options, ThrottleGroupLimits)
        group = ThrottleGroup(options.id, _limits(options))
        group.members = 1  # the object itself: without it the group would go with its last node
        return group

    def _credentials(self, options: TlsCredsX509Options) -> TlsCredentials:
        if not options.dir:
            raise OptionError("dir", options.dir, "given: a directory of X.509 files")
        if options.priority not in (None, "NORMAL"):
            raise OptionError("priority", options.priority, "NORMAL, or left out: TLS is not GnuTLS's here")
        password = None if options.passwordid is None else self.secret(options.passwordid, "passwordid")
        credentials = TlsCredentials(options.dir, options.endpoint, options.verify_peer, password)
        try:
            credentials.context()  # what is wrong with the files is the error of now, not of the first connection
        except OptionError as error:
            raise OptionError("dir", error.value, error.expected) from None
        return credentials


def _secret(options: SecretOptions) -> Secret:
    if options.keyid is not None or options.iv is not None:
        name = "keyid" if options.keyid is not None else "iv"
        raise OptionError(name, getattr(options, name), "left out: encrypted secrets are not offered; use file")
    if (options.data is None) == (options.file is None):
        both = options.data is not None
        raise OptionError("file" if both else "data", options.file, f"{'left out' if both else 'given'}: a secret has "
                          "either data or file")
    data = Path(options.file).read_bytes() if options.file is not None else (options.data or "").encode()
    if options.format == "base64":
        try:
            data = base64.b64decode(b"".join(data.split()), validate=True)
        except binascii.Error:
            raise OptionError("format", "base64", "raw: the secret is no base64") from None
    return Secret(data)


def _limits(options: ThrottleGroupLimits) -> Limits:
    """The limits; those in one piece take precedence, as with QEMU."""
    single = {name: value for flat, name in _FLAT.items() if (value := getattr(options, flat)) is not UNSET}
    whole = {} if options.limits is None else {
        name: value for name in Limits.__struct_fields__
        if (value := getattr(options.limits, name)) != getattr(Limits(), name)}
    return Limits(**{**single, **whole})
