"""A daemon that listens on TCP with TLS, and clients of it."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lb.api.access import Access, Role
from lb.tests.fakes.daemon import Running, serving
from lb.tests.fakes.host import Host


@dataclass
class Certificate:
    """A certificate of 127.0.0.1 and ::1, signed by itself, and its key."""

    directory: Path

    def __post_init__(self) -> None:
        self.certificate, self.key = self.directory / "lb.pem", self.directory / "lb.key"
        self.renew()

    def renew(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "xdp-lb test")])
        now = datetime.datetime.now(datetime.UTC)
        addresses = [x509.IPAddress(ipaddress.ip_address(a)) for a in ("127.0.0.1", "::1")]
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
            .sign(key, hashes.SHA256())
        )
        self.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        self.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    @property
    def trusted(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.certificate))


@dataclass
class Remote:
    """The daemon over TCP, and one token of each role."""

    running: Running
    certificate: Certificate
    url: str
    tokens: dict[Role, str]

    def http(self, token: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        return httpx.Client(base_url=self.url, verify=self.certificate.trusted, headers=headers, trust_env=False)

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.url.rpartition(":")[2])


@contextmanager
def serving_tcp(host: Host, tmp_path: Path, certificate: Certificate, **more: Any) -> Iterator[Remote]:
    with Access.open(tmp_path / "access.db") as access:
        tokens = {role: access.create(str(role), role) for role in Role}
    settings: dict[str, Any] = {
        "listen": (("127.0.0.1", 0),),
        "tls_certificate": certificate.certificate,
        "tls_key": certificate.key,
        **more,
    }
    with serving(host, tmp_path, **settings) as daemon:
        port = daemon.daemon._listeners[1].sockets[0].getsockname()[1]
        yield Remote(daemon, certificate, f"https://127.0.0.1:{port}", tokens)
