"""Identity of a process: its certificate, its private key and the run token.

`load_identity` validates the files of this machine. `check_mutual_trust` diagnoses a failed TLS handshake, which gRPC
reports in the same way as an unavailable server.
"""

from __future__ import annotations

import datetime
import socket
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path

from deskrl.core.addresses import HostPort
from deskrl.core.errors import UserError

ROLES = ("replay", "inference", "learner", "actor", "operator")
"""Roles with an identity; `operator` stands for commands of a user, such as `deskrl up` or `deskrl status`."""

TOKEN_FILE = "token"
"""Name of the file that holds the run token."""

_RENEW = "create it again with `deskrl certificates`"
_SAME = "use certificates from the same certificate directory on both machines"
_PROBE_TIMEOUT_S = 2.0
_NUM_PROBES, _PROBE_INTERVAL_S = 3, 0.3
_CORRUPTED = ("BAD_RECORD_MAC", "DECRYPT")
"""Parts of OpenSSL's error names for corrupted bytes."""


@dataclass(frozen=True)
class IdentityFiles:
    """Paths of the identity of a role."""

    folder: Path
    role: str

    @property
    def ca(self) -> Path:
        """Certificate of the authority."""
        return self.folder / "ca.pem"

    @property
    def certificate(self) -> Path:
        """Certificate of the role."""
        return self.folder / f"{self.role}.pem"

    @property
    def key(self) -> Path:
        """Private key of the role."""
        return self.folder / f"{self.role}-key.pem"

    @property
    def token(self) -> Path:
        """File of the run token."""
        return self.folder / TOKEN_FILE


@dataclass(frozen=True)
class Identity:
    """Credentials of a process; its repr contains no secrets."""

    files: IdentityFiles
    ca: bytes = field(repr=False)
    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    token: str = field(repr=False)

    @property
    def role(self) -> str:
        """Role that the certificate names."""
        return self.files.role


def load_identity(folder: Path, role: str) -> Identity:
    """Read the identity of a role.

    Raises:
        UserError: a file is missing or damaged, a secret file is readable by other users, or the certificate is
            expired or issued by another authority.
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
        raise UserError(f"{files.token}: empty", _RENEW)
    _check_valid(identity)
    return identity


def _read(path: Path, *, secret: bool = False) -> bytes:
    try:
        if secret and path.stat().st_mode & 0o007:
            raise UserError(f"{path}: secret file is readable by all users", f"chmod 600 {path}")
        return path.read_bytes()
    except OSError as error:
        hint = "create it with `deskrl certificates`, or correct security.certificates_dir"
        raise UserError(f"{path}: {error.strerror}", hint) from error


def _check_valid(identity: Identity) -> None:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization

    path = identity.files.certificate
    try:
        certificate = x509.load_pem_x509_certificate(identity.certificate)
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(identity.ca))
        key = serialization.load_pem_private_key(identity.key, None)
    except (ValueError, TypeError, InvalidSignature) as error:
        reason = f"{path}: certificate, key or {identity.files.ca.name} is damaged, or issued by another authority"
        raise UserError(reason, _RENEW) from error
    if key.public_key() != certificate.public_key():
        raise UserError(f"{identity.files.key}: does not match {path.name}", _RENEW)
    now, start, end = (
        datetime.datetime.now(datetime.UTC),
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
    )
    if now > end:
        raise UserError(f"{path}: expired on {end:%Y-%m-%d %H:%M} UTC", _RENEW)
    if now < start:
        raise UserError(f"{path}: not valid before {start:%Y-%m-%d %H:%M} UTC", "correct this machine's clock")


def check_mutual_trust(address: str, identity: Identity | None) -> None:
    """Raise UserError if this process and the server at `host:port` cannot authenticate each other.

    Returns if no server answers or the handshake succeeds, since another attempt may then succeed. The failure has to
    be the same in several attempts, because a single one may be due to a server that is stopping or to corrupted
    bytes.
    """
    failure = _probe(address, identity)
    for _ in range(_NUM_PROBES - 1):
        if failure is None:
            return
        time.sleep(_PROBE_INTERVAL_S)
        if _probe(address, identity) != failure:
            return
    if failure is not None:
        raise UserError(failure.reason, failure.hint)


@dataclass(frozen=True)
class _TrustFailure:
    """Reason why a TLS handshake fails."""

    reason: str
    hint: str
    cause: str = ""
    """OpenSSL's name of the error."""


def _probe(address: str, identity: Identity | None) -> _TrustFailure | None:
    """Return why one handshake fails; None if it succeeds or no server answers."""
    try:
        is_accepted = _handshake(address, identity)
    except ssl.SSLCertVerificationError as error:
        reason = error.verify_message.rstrip(".")
        return _TrustFailure(
            f"the certificate of the server at {address} is rejected: {reason}", _verification_hint(reason)
        )
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        return None
    except ssl.SSLError as error:
        if identity is None or any(word in (error.reason or "") for word in _CORRUPTED):
            return None
        reason = f"the server at {address} does not use TLS, or is not a deskrl server"
        return _TrustFailure(reason, "start it with the same security.certificates_dir", error.reason or "")
    except OSError:
        return None
    if identity is None:
        reason = f"the server at {address} requires a certificate"
        return _TrustFailure(reason, "set security.certificates_dir to the certificate directory of the run")
    if is_accepted:
        return None
    reason = f"the server at {address} rejects {identity.files.certificate}"
    return _TrustFailure(reason, f"{_SAME}, and correct both clocks")


def _handshake(address: str, identity: Identity | None) -> bool:
    """Perform a TLS handshake; return whether the server then sends its HTTP/2 preface instead of closing."""
    server = HostPort(address)
    context = _probe_context(identity)
    with socket.create_connection((server.host, server.port), _PROBE_TIMEOUT_S) as plain:
        plain.settimeout(_PROBE_TIMEOUT_S)
        with context.wrap_socket(plain, server_hostname=server.host) as encrypted:
            return bool(encrypted.recv(1))


def _probe_context(identity: Identity | None) -> ssl.SSLContext:
    if identity is None:  # only to determine whether the server uses TLS
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context = ssl.create_default_context(cafile=str(identity.files.ca))
        context.load_cert_chain(identity.files.certificate, identity.files.key)
    context.set_alpn_protocols(["h2"])
    return context


def _verification_hint(reason: str) -> str:
    if "mismatch" in reason.lower() or "not valid for" in reason:
        return "add its host with `deskrl certificates --host`, or correct the address"
    if "expired" in reason:
        return "renew it with `deskrl certificates` and restart that server"
    return _SAME
