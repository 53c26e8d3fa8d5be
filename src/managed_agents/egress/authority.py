"""The certificate authority of an installation's host: how the gateway can end TLS to hosts whose requests get credentials.

Made once, in the data directory, readable by this uid alone. Sandboxes are given its certificate as one more authority to trust;
its key never leaves the host. Certificates of hosts are made when they are needed and live in memory.

What makes certificates weighs some megabytes: processes import this module when they need one, and a child makes what is needed
at the start (`python -m managed_agents.egress.authority DATA_DIR BUNDLE JAVA_BUNDLE`, the usual authorities on standard input).

Race: several processes may start at once; a pair is written beside and moved into place whole, and who comes second uses the
first one's.
"""

import os
import shutil
import ssl
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from managed_agents.egress.tls import AUTHORITY_CERTIFICATE, AUTHORITY_DIRECTORY, AuthorityUnreadable

JAVA_PASSWORD = "changeit"
YEARS = 10
LEAF_DAYS = 7
RENEW_SECONDS = 24 * 3600.0
LEAVES_MAX = 512
_EARLIER = timedelta(hours=1)  # clocks differ
_COMMON_NAME_CHARS_MAX = 64


class Authority:
    """Makes certificates for hosts."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate, self._key = certificate, key
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())
        self._contexts: OrderedDict[str, tuple[float, ssl.SSLContext]] = OrderedDict()

    @property
    def pem(self) -> str:
        """The certificate, for those who are to trust it."""
        return self._certificate.public_bytes(serialization.Encoding.PEM).decode()

    def context(self, host: str) -> ssl.SSLContext:
        """What to be `host` with, for clients that mean it: another name in the handshake is refused."""
        now = time.monotonic()
        found = self._contexts.get(host)
        if found is not None and now - found[0] < RENEW_SECONDS:
            self._contexts.move_to_end(host)
            return found[1]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        context.sni_callback = _only(host)
        self._present(context, host)
        self._contexts[host] = now, context
        while len(self._contexts) > LEAVES_MAX:
            self._contexts.popitem(last=False)
        return context

    def _present(self, context: ssl.SSLContext, host: str) -> None:
        key = self._leaf_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        # `ssl` reads files only; this one is in memory.
        file = os.memfd_create("leaf", os.MFD_CLOEXEC)
        try:
            os.write(file, key + self._leaf(host).public_bytes(serialization.Encoding.PEM))
            context.load_cert_chain(f"/proc/self/fd/{file}")
        finally:
            os.close(file)

    def _leaf(self, host: str) -> x509.Certificate:
        try:
            name: x509.GeneralName = x509.IPAddress(ip_address(host))
        except ValueError:
            name = x509.DNSName(host)
        now = datetime.now(UTC)
        usage = _usage(digital_signature=True)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:_COMMON_NAME_CHARS_MAX])]))
            .issuer_name(self._certificate.subject)
            .public_key(self._leaf_key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _EARLIER)
            .not_valid_after(min(now + timedelta(days=LEAF_DAYS), self._certificate.not_valid_after_utc))
            .add_extension(x509.SubjectAlternativeName([name]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._leaf_key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def _only(host: str) -> Callable[[ssl.SSLObject | ssl.SSLSocket, str | None, ssl.SSLContext], int | None]:
    """Refuses handshakes that name another host."""

    def named(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> int | None:
        del connection, context
        # Addresses are not named in handshakes (RFC 6066, 3), and some clients name nothing.
        return None if name is None or name.lower().rstrip(".") == host else ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME

    return named


def load(data_dir: Path) -> Authority:
    """Read the authority, or make it. Repeating is safe, also at the same time.

    Raises: AuthorityUnreadable.
    """
    directory = data_dir / AUTHORITY_DIRECTORY
    try:
        if not directory.exists():
            _make(directory)
        certificate = x509.load_pem_x509_certificate((directory / AUTHORITY_CERTIFICATE).read_bytes())
        key = serialization.load_pem_private_key((directory / "key.pem").read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise AuthorityUnreadable(f"{directory}: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise AuthorityUnreadable(f"{directory}: key and certificate are not a pair")
    if certificate.not_valid_after_utc <= datetime.now(UTC):
        raise AuthorityUnreadable(f"{directory}: the certificate has expired; remove the directory to have another one made")
    return Authority(certificate, key)


def main() -> None:
    """Make the authority, and the bundles that sandboxes trust, where they are not there or not what they should be."""
    data_dir, bundle, java_bundle = (Path(argument) for argument in sys.argv[1:4])
    try:
        text = sys.stdin.read() + load(data_dir).pem
        _replace(java_bundle, java_store(text))
        _replace(bundle, text.encode())
    except (AuthorityUnreadable, OSError, ValueError) as error:
        sys.exit(str(error))


def _replace(path: Path, content: bytes) -> None:
    """Whole or not at all, and a file of its own: sandboxes that have the old one mounted keep it."""
    draft = path.with_suffix(f"{path.suffix}.{os.getpid()}")
    draft.write_bytes(content)
    draft.chmod(0o644)
    draft.rename(path)


def java_store(authorities: str) -> bytes:
    """The same authorities as a file that Java reads, with the password that Java's own has. Raises: ValueError."""
    with warnings.catch_warnings():
        # Lists of authorities hold old ones with serial numbers that are frowned upon. They stay what they are.
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        found = x509.load_pem_x509_certificates(authorities.encode())
    certificates = [pkcs12.PKCS12Certificate(one, str(number).encode()) for number, one in enumerate(found)]
    return pkcs12.serialize_java_truststore(certificates, serialization.BestAvailableEncryption(JAVA_PASSWORD.encode()))


def _make(directory: Path) -> None:
    """Raises: OSError."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"managed-agents egress {os.urandom(4).hex()}")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + timedelta(days=365 * YEARS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    draft = directory.with_name(f"{AUTHORITY_DIRECTORY}.{os.getpid()}.{os.urandom(4).hex()}")
    draft.mkdir(mode=0o700, parents=True)
    try:
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        with open(os.open(draft / "key.pem", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(pem)
            os.fsync(file.fileno())
        (draft / AUTHORITY_CERTIFICATE).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        draft.rename(directory)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        if not directory.exists():  # else another process was first
            raise


def _usage(**given: bool) -> x509.KeyUsage:
    names = "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign "
    names += "encipher_only decipher_only"
    return x509.KeyUsage(**{name: given.get(name, False) for name in names.split()})


if __name__ == "__main__":
    main()
