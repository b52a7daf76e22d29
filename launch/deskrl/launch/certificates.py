"""Certificate directory of a run: a certificate authority, one certificate per role and the run token.

Creating it again keeps the authority and the token, so that distributed files remain valid, and renews the certificates
of the roles, for other hosts or before they expire.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deskrl.core.errors import UserError
from deskrl.core.security.peer_identity import ROLES, TOKEN_FILE, IdentityFiles

CA_KEY = "ca-key.pem"
"""File name of the key that signs certificates; no role reads it, so it should stay on one machine."""

_SERVERS = frozenset({"replay", "inference"})
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_CA_DAYS = 3650
_RESTORE = "restore it, or choose another directory"
_CLOCK_SKEW = datetime.timedelta(days=1)
"""Tolerated lag of the clock of a machine that verifies a certificate behind the machine that created it."""


def make_certificates(folder: Path, hosts: Sequence[str], days: int) -> list[Path]:
    """Create or renew the certificates in a directory; secret files are readable by their owner only.

    Args:
        folder: directory, created if it is missing.
        hosts: host names and addresses of servers, in addition to the loopback addresses.
        days: validity of the roles' certificates in days.

    Returns:
        The files that were written.

    Raises:
        UserError: a host is neither a name nor an address, or the directory cannot be written.
    """
    if days < 1:
        raise UserError(f"--days: must be at least 1, not {days}", "choose the validity of the certificates in days")
    names = [_general_name(host) for host in dict.fromkeys((*_LOCAL_HOSTS, *hosts))]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        ca, ca_key, written = _authority(folder)
        for role in ROLES:
            written += _certify(IdentityFiles(folder, role), ca, ca_key, names, days)
        if not (folder / TOKEN_FILE).exists():
            written.append(_write(folder / TOKEN_FILE, (secrets.token_urlsafe(32) + "\n").encode(), secret=True))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}", "choose a writable directory") from error
    return written


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey, list[Path]]:
    """Return the certificate authority of a directory with the files written, creating it if there is none."""
    path, key_path = IdentityFiles(folder, "").ca, folder / CA_KEY
    if path.exists() and key_path.exists():
        try:
            key = serialization.load_pem_private_key(key_path.read_bytes(), None)
            if isinstance(key, ec.EllipticCurvePrivateKey):
                return x509.load_pem_x509_certificate(path.read_bytes()), key, []
        except (ValueError, TypeError) as error:
            raise UserError(f"{folder}: {path.name} or {CA_KEY} is not valid PEM", _RESTORE) from error
    if path.exists():
        raise UserError(f"{key_path}: not found; it is needed to sign certificates", _RESTORE)
    new_key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"deskrl {secrets.token_hex(4)}")])
    certificate = (
        _builder(name, name, new_key.public_key(), _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(new_key, hashes.SHA256())
    )
    return certificate, new_key, [_write(path, _pem(certificate)), _write(key_path, _key_pem(new_key), secret=True)]


def _certify(
    files: IdentityFiles,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    hosts: Sequence[x509.GeneralName],
    days: int,
) -> list[Path]:
    """Write certificate and key of a role; only those of servers name hosts, so clients cannot impersonate servers."""
    key = ec.generate_private_key(ec.SECP256R1())
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, files.role)])
    builder = _builder(name, ca.subject, key.public_key(), days)
    if files.role in _SERVERS:
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    certificate = (
        builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    return [_write(files.certificate, _pem(certificate)), _write(files.key, _key_pem(key), secret=True)]


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.removeprefix("*.").split(".")
    if not host.isascii() or not all(label.replace("-", "").replace("_", "").isalnum() for label in labels):
        raise UserError(f"--host: {host} is neither a host name nor an IP address", "omit scheme and port")
    return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, *, secret: bool = False) -> Path:
    """Replace a file; a secret file is never readable by other users, not even temporarily."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
    with open(descriptor, "wb") as file:
        file.write(data)
    os.replace(temporary, path)
    return path
