"""Who a process is to the others: its certificate, its key and the run's token.

Knows files and TLS; knows no channel. What is wrong with a machine's own files is refused as they are read; what is
wrong with the other side is found by `refuse_stranger`, because gRPC reports both as a server that is away.
"""

from __future__ import annotations

import datetime
import socket
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path

from deskrl.core.errors import UserError

ROLES = ("replay", "inference", "learner", "actor", "operator")
"""Who takes part in a run; `operator` is a person's command, such as `deskrl up` or `deskrl status`."""

TOKEN = "token"
"""Name of the file that holds the run's token."""

_RENEW = "make it anew with `deskrl certificates`"
_SAME = "give both sides certificates of one `deskrl certificates`"
_PROBE_S = 2.0
_NUM_LOOKS, _BETWEEN_LOOKS_S = 3, 0.3
_CORRUPTED = ("BAD_RECORD_MAC", "DECRYPT")
"""In OpenSSL's words for bytes that are not those which were sent."""


@dataclass(frozen=True)
class IdentityFiles:
    """Where the identity of a role lies."""

    folder: Path
    role: str

    @property
    def ca(self) -> Path:
        """The authority's certificate."""
        return self.folder / "ca.pem"

    @property
    def certificate(self) -> Path:
        """The role's certificate."""
        return self.folder / f"{self.role}.pem"

    @property
    def key(self) -> Path:
        """The key to it."""
        return self.folder / f"{self.role}-key.pem"

    @property
    def token(self) -> Path:
        """The run's token."""
        return self.folder / TOKEN


@dataclass(frozen=True)
class Identity:
    """What a process shows to others. Secrets are left out of its text form."""

    files: IdentityFiles
    ca: bytes = field(repr=False)
    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    token: str = field(repr=False)

    @property
    def role(self) -> str:
        """Which role it holds."""
        return self.files.role


def load_identity(folder: Path, role: str) -> Identity:
    """Read the identity of a role.

    Raises:
        UserError: a file is missing, readable by everybody, damaged, of another authority, or its time is over.
    """
    files = IdentityFiles(folder, role)
    identity = Identity(
        files,
        ca=_read(files.ca),
        certificate=_read(files.certificate),
        key=_read(files.key, secret=True),
        token=_read(files.token, secret=True).decode(errors="replace").strip(),
    )
    if not identity.token:
        raise UserError(f"{files.token} is empty", _RENEW)
    _refuse_invalid(identity)
    return identity


def _read(path: Path, *, secret: bool = False) -> bytes:
    try:
        if secret and path.stat().st_mode & 0o007:
            raise UserError(f"{path} is secret and can be read by everybody", f"chmod 600 {path}")
        return path.read_bytes()
    except OSError as error:
        mend = "make it with `deskrl certificates`, or mend security.folder"
        raise UserError(f"{path}: {error.strerror}", mend) from error


def _refuse_invalid(identity: Identity) -> None:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization

    path = identity.files.certificate
    try:
        certificate = x509.load_pem_x509_certificate(identity.certificate)
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(identity.ca))
        key = serialization.load_pem_private_key(identity.key, None)
    except (ValueError, TypeError, InvalidSignature) as error:
        reason = f"{path}, its key or {identity.files.ca.name} is damaged, or of another authority"
        raise UserError(reason, _RENEW) from error
    if key.public_key() != certificate.public_key():
        raise UserError(f"{identity.files.key} is not the key to {path.name}", _RENEW)
    now, start, end = (
        datetime.datetime.now(datetime.UTC),
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
    )
    if now > end:
        raise UserError(f"{path} expired on {end:%Y-%m-%d %H:%M} UTC", _RENEW)
    if now < start:
        raise UserError(f"{path} is valid from {start:%Y-%m-%d %H:%M} UTC on", "set this machine's clock")


def refuse_stranger(address: str, identity: Identity | None) -> None:
    """Raise UserError if what answers at `host:port` and this process will never trust each other.

    Does nothing where nobody answers, or all is well: then another attempt may succeed. One look proves nothing: a
    server may be in the midst of ending, and bytes may change on their way. What is wrong has to be so each time.
    """
    stranger = _look(address, identity)
    for _ in range(_NUM_LOOKS - 1):
        if stranger is None:
            return
        time.sleep(_BETWEEN_LOOKS_S)
        if _look(address, identity) != stranger:
            return
    if stranger is not None:
        raise UserError(stranger.reason, stranger.mend)


@dataclass(frozen=True)
class _Stranger:
    """Why two processes do not trust each other."""

    reason: str
    mend: str
    cause: str = ""
    """OpenSSL's word for it."""


def _look(address: str, identity: Identity | None) -> _Stranger | None:
    """What is wrong with what answers, as far as one hand-shake tells."""
    try:
        is_let_in = _is_let_in(address, identity)
    except ssl.SSLCertVerificationError as error:
        reason = error.verify_message.rstrip(".")
        return _Stranger(f"the certificate of the server at {address} is refused: {reason}", _mend(reason))
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        return None
    except ssl.SSLError as error:
        if identity is None or any(word in (error.reason or "") for word in _CORRUPTED):
            return None
        reason = f"the server at {address} speaks without encryption, or is no server of deskrl"
        return _Stranger(reason, "start it with the same security.folder", error.reason or "")
    except OSError:
        return None
    if identity is None:
        reason = f"the server at {address} asks for a certificate"
        return _Stranger(reason, "set security.folder to the folder of the run's certificates")
    if is_let_in:
        return None
    reason = f"the server at {address} refuses {identity.files.certificate}"
    return _Stranger(reason, f"{_SAME}, and set both machines' clocks")


def _is_let_in(address: str, identity: Identity | None) -> bool:
    """Shake hands; whether the server then greets, as HTTP/2 has it, rather than hang up."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    context = _probe_context(identity)
    with socket.create_connection((host, int(port)), _PROBE_S) as plain:
        plain.settimeout(_PROBE_S)
        with context.wrap_socket(plain, server_hostname=host) as encrypted:
            return bool(encrypted.recv(1))


def _probe_context(identity: Identity | None) -> ssl.SSLContext:
    if identity is None:  # only to learn whether the other side speaks TLS at all
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context = ssl.create_default_context(cafile=str(identity.files.ca))
        context.load_cert_chain(identity.files.certificate, identity.files.key)
    context.set_alpn_protocols(["h2"])
    return context


def _mend(reason: str) -> str:
    if "mismatch" in reason.lower() or "not valid for" in reason:
        return "name its host in `deskrl certificates --host`, or mend the address"
    if "expired" in reason:
        return "make it anew with `deskrl certificates` and start that server again"
    return _SAME
