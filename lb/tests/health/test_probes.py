"""Probes against real servers on the loopback interface, each of which answers as its test wants."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from threading import Event, Thread
from typing import cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lb.health.probes import CannotCheck, Target, probe
from lb.model.health_check import HealthCheck

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nall good"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nall \r\n4;x=y\r\ngood\r\n0\r\n\r\n"
UNTIL_CLOSED = b"HTTP/1.0 200 OK\r\n\r\nall good"


def answering(answer: bytes, *, close: bool = True, asked: list[bytes] | None = None) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        if asked is not None:
            asked.append(request)
        for byte in range(0, len(answer), 7):  # in pieces
            writer.write(answer[byte : byte + 7])
            await writer.drain()
        if not close:
            await reader.read()
        writer.close()

    return handle


async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


@asynccontextmanager
async def serving(handle: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Gives the port."""
    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    async with server:
        yield server.sockets[0].getsockname()[1]


def unused_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def why(check: str, port: int, address: str = "127.0.0.1") -> str:
    return (await probe(Target(HealthCheck.parse(check), address, port))).why


def why_of(check: str, handle: Handler, tls: ssl.SSLContext | None = None) -> str:
    async def run() -> str:
        async with serving(handle, tls) as port:
            return await why(check, port)

    return asyncio.run(run())


def test_tcp_wants_a_connection_and_nothing_else() -> None:
    assert why_of("tcp", silence) == ""
    assert asyncio.run(why("tcp", unused_port())) == "connection refused"


def test_no_local_port_is_left_waiting() -> None:
    """As TIME_WAIT would: the end that closes first has it."""

    async def run() -> int:
        async with serving(silence) as port:
            for _ in range(5):
                assert await why("tcp", port) == ""
            return port

    port = asyncio.run(run())
    ended = Path("/proc/net/tcp").read_text().splitlines()
    assert not [line for line in ended if f":{port:04X} 06 " in line]


@pytest.mark.parametrize("answer", [PLAIN, CHUNKED, UNTIL_CLOSED])
@pytest.mark.parametrize(
    ("check", "fault"),
    [
        ("http", ""),
        ("http status=200", ""),
        ("http status=300-399,500", "status 200"),
        ("http body='all good'", ""),
        ("http body=bad", "response body does not contain bad"),
        ("http match='^all +good$'", ""),
        ("http match='^good'", "response body does not match ^good"),
    ],
)
def test_http_wants_a_status_and_a_body(answer: bytes, check: str, fault: str) -> None:
    assert why_of(check, answering(answer)) == fault


def test_http_reads_no_further_than_the_answer_goes() -> None:
    assert why_of("http body=good timeout=5s", answering(PLAIN, close=False)) == ""
    assert why_of("http body=good timeout=5s", answering(CHUNKED, close=False)) == ""


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 2000 OK\r\n\r\n", b"x" * 40000])
def test_what_is_not_http_is_a_failure(answer: bytes) -> None:
    assert why_of("http", answering(answer)) == "response is not HTTP"


def test_http_asks_by_method_path_and_host() -> None:
    asked: list[bytes] = []
    why_of("http /up?x=1 method=HEAD host=www.example.org", answering(PLAIN, asked=asked))
    assert asked[0].startswith(b"HEAD /up?x=1 HTTP/1.1\r\nHost: www.example.org\r\n")
    why_of("http", answering(PLAIN, asked=asked))
    assert asked[1].startswith(b"GET / HTTP/1.1\r\nHost: 127.0.0.1:")


@pytest.mark.parametrize("check", ["http timeout=100ms", "https verify=off timeout=100ms"])
def test_a_server_that_is_silent_is_given_up_at_the_timeout(check: str) -> None:
    assert why_of(check, silence) == "no response within 100ms"


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of www.example.org, signed by itself, with its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("www.example.org")]), critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + secret)
    return path


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        ("https host=www.example.org ca={ca} body=good", ""),
        ("https verify=off", ""),
        ("https verify=off status=500", "status 200"),
        ("https host=www.example.org", "TLS: self-signed certificate"),
        ("https host=other.example.org ca={ca}", "TLS: Hostname mismatch, certificate is not valid for"),
    ],
)
def test_https_wants_the_certificate_of_the_host(certificate: Path, check: str, fault: str) -> None:
    names: list[str] = []
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    tls.sni_callback = lambda _, name, __: names.append(name)
    found = why_of(f"{check.format(ca=certificate)} timeout=5s", answering(PLAIN), tls)
    assert found.startswith(fault)
    assert bool(found) == bool(fault)
    if "host=" in check:
        assert names[0] in check


def test_https_of_a_server_without_tls_is_a_failure() -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail\r\n")
        writer.close()

    assert why_of("https verify=off timeout=5s", plain).startswith("TLS: ")


# UDP


class Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.transport.sendto(b"pong of " + data, addr)


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        ("udp send=ping expect=pong", ""),
        ("udp send=ping", ""),
        ("udp send=0x00ff expect=0x00ff", ""),
        ("udp send=ping expect=other timeout=100ms", "no response within 100ms"),
    ],
)
def test_udp_wants_the_answer_expected(check: str, fault: str) -> None:
    async def run() -> str:
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Echo, ("127.0.0.1", 0))
        try:
            return await why(check, transport.get_extra_info("sockname")[1])
        finally:
            transport.close()

    assert asyncio.run(run()) == fault


def test_udp_to_a_port_without_a_server_is_a_failure_by_the_icmp_error() -> None:
    assert asyncio.run(why("udp timeout=5s", unused_port(socket.SOCK_DGRAM))) == "connection refused"


def test_udp_silence_is_a_success_where_no_answer_is_expected() -> None:
    async def run() -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", 0))
            return await why("udp timeout=50ms", sock.getsockname()[1])

    assert asyncio.run(run()) == ""


def test_no_pattern_takes_longer_than_the_answer_is_long() -> None:
    """Backtracking would take 2**250000 steps."""
    body = b"a" * 250_000 + b"!"
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    assert why_of("http match='^(a+)+$' timeout=10s", answering(answer)) == "response body does not match ^(a+)+$"


def test_an_answer_in_tiny_chunks_is_put_together() -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 40_000 + b"0\r\n\r\n"
    assert why_of("http match='^x{1000}(x|y)*$' timeout=10s", answering(answer)) == ""


def test_a_length_that_is_no_number_that_fits_ends_no_check() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nall good"
    assert why_of("http body=good timeout=10s", answering(answer)) == ""


# Scripts


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return f"script timeout=5s {path} one 'two words'"


@pytest.mark.parametrize(
    ("text", "fault"), [("exit 0", ""), ("exit 3", "exit code 3"), ("kill -TERM $$", "killed by signal 15")]
)
def test_a_script_says_it_by_its_exit_code(root_directory: Path, text: str, fault: str) -> None:
    assert asyncio.run(why(script(root_directory / "check", text), 0)) == fault


def test_a_script_knows_backend_and_vip_and_nothing_of_this_process(
    root_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "x")
    out = root_directory / "out"
    check = HealthCheck.parse(
        script(root_directory / "check", f'echo "$XDP_LB_BACKEND $XDP_LB_VIP $SECRET $1 $2" > {out}')
    )
    names = (("XDP_LB_BACKEND", "10.0.0.11:80"), ("XDP_LB_VIP", "10.0.0.1:80/tcp"))
    asyncio.run(probe(Target(check, "10.0.0.11", 80, environment=names)))
    assert out.read_text() == "10.0.0.11:80 10.0.0.1:80/tcp  one two words\n"


def test_a_script_that_is_not_there_is_a_failure(root_directory: Path) -> None:
    assert asyncio.run(why(f"script {root_directory}/missing", 0)) == f"{root_directory}/missing: not found"


def test_a_script_that_others_have_become_able_to_change_is_not_run(root_directory: Path) -> None:
    ran = root_directory / "ran"
    check = script(root_directory / "check", f"touch {ran}")
    assert asyncio.run(why(check, 0)) == ""
    ran.unlink()
    root_directory.chmod(0o777)
    said = asyncio.run(why(check, 0))
    assert said == f"{root_directory}: writable by others than root: run chmod go-w {root_directory}"
    assert not ran.exists()


def test_a_script_is_killed_at_its_timeout_with_all_that_it_started(root_directory: Path) -> None:
    pids = root_directory / "pids"
    check = script(root_directory / "check", f"sleep 600 & echo $! $$ > {pids}; wait").replace("5s", "500ms")
    assert asyncio.run(why(check, 0)) == "no response within 500ms"
    deadline = time.monotonic() + 5
    while not all(ended(int(pid)) for pid in pids.read_text().split()):
        assert time.monotonic() < deadline


def ended(pid: int) -> bool:
    """Or a zombie, whom only its new parent can bury."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


# This host


def test_what_this_host_lacks_says_nothing_about_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    with pytest.raises(CannotCheck, match="Too many open files"):
        asyncio.run(why("tcp", 80))


def test_an_event_loop_that_is_late_takes_no_time_from_the_backend() -> None:
    def answer_all(listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(1000)
                    Event().wait(0.02)
                    connection.sendall(PLAIN)

    async def busy() -> None:
        for _ in range(3):
            Event().wait(0.15)  # the loop's own thread: it stands still
            await asyncio.sleep(0)

    async def run(port: int) -> str:
        found, _ = await asyncio.gather(why("http timeout=100ms", port), busy())
        return found

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = Thread(target=answer_all, args=(listening,))
        thread.start()
        try:
            assert asyncio.run(run(listening.getsockname()[1])) == ""
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_a_probe_leaves_from_the_address_it_is_told() -> None:
    peers: list[str] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peers.append(writer.get_extra_info("peername")[0])
        writer.write(PLAIN)
        writer.close()

    async def run() -> None:
        async with serving(note) as port:
            await probe(Target(HealthCheck.parse("http"), "127.0.0.1", port, str(ip_address("127.0.0.7"))))

    asyncio.run(run())
    assert peers == ["127.0.0.7"]
