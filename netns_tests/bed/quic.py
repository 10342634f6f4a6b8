"""A real QUIC client and server (aioquic), the server with connection IDs that a QUIC-LB balancer can read.

Enters: a host, and the server ID that the server puts into its connection IDs. Leaves: a server on all of the host's
addresses named, which echoes the lines of each stream behind the host's label; or a client's connection with one
stream, which the test moves from socket to socket. `python -m netns_tests.bed.quic NAME CONFIG:HEX PORT,...
ADDRESS,...` is the server itself; each further CONFIG:HEX on its standard input is its server ID from then on.
"""

from __future__ import annotations

import asyncio
import datetime
import functools
import secrets
import select
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, HandshakeCompleted, QuicEvent, StreamDataReceived
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from netns_tests.bed.servers import REPOSITORY
from netns_tests.bed.topology import Host

# Short headers do not tell how long the ID is: the server's are of one length, whatever their configuration.
CONNECTION_ID_SIZE = 12
UNROUTABLE = 7


def configuration_of(connection_id: bytes) -> int:
    """Config rotation codepoint: draft-ietf-quic-load-balancers-21, section 3."""
    return connection_id[0] >> 5


class ConnectionIds:
    """Connection IDs without a key: draft-ietf-quic-load-balancers-21, section 5.

    `server_id`, CONFIG:HEX, may change at any time: IDs drawn earlier stay.
    """

    def __init__(self, server_id: str) -> None:
        self.server_id = server_id

    def draw(self) -> bytes:
        config, server_id = self.server_id.split(":")
        routable = bytes([int(config) << 5 | secrets.randbits(5)]) + bytes.fromhex(server_id)
        return routable + secrets.token_bytes(CONNECTION_ID_SIZE - len(routable))


class Echo(QuicConnectionProtocol):
    """The server's side of a connection.

    aioquic draws connection IDs itself and has no setting for it: each is replaced before it is sent the first time.
    """

    def __init__(self, label: str, ids: ConnectionIds, quic: QuicConnection, stream_handler: None = None) -> None:
        super().__init__(quic, stream_handler)
        self._label, self._ids = label, ids
        (first,) = quic._host_cids
        first.cid = quic.host_cid = quic._local_initial_source_connection_id = ids.draw()
        self._replaced = first.sequence_number

    def transmit(self) -> None:
        for issued in self._quic._host_cids:
            if issued.sequence_number > self._replaced:
                issued.cid, self._replaced = self._ids.draw(), issued.sequence_number
        super().transmit()

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, StreamDataReceived):
            self._quic.send_stream_data(event.stream_id, f"{self._label} ".encode() + event.data)


async def serve_echo(label: str, server_id: str, ports: Sequence[str], addresses: Sequence[str]) -> None:
    """Until standard input ends."""
    ids = ConnectionIds(server_id)
    configuration = server_configuration()
    for port, address in product(ports, addresses):
        await serve(
            address, int(port), configuration=configuration, create_protocol=functools.partial(Echo, label, ids)
        )
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        ids.server_id = line.strip()
        print("ready", flush=True)


def server_configuration() -> QuicConfiguration:
    """With a certificate that nobody has signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "vip")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = x509.CertificateBuilder(
        issuer_name=name,
        subject_name=name,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now,
        not_valid_after=now + datetime.timedelta(days=1),
    ).sign(key, hashes.SHA256())
    return QuicConfiguration(
        is_client=False, certificate=certificate, private_key=key, connection_id_length=CONNECTION_ID_SIZE
    )


class QuicServer:
    """A running server; it ends with its host."""

    def __init__(self, host: Host, server_id: str, ports: Sequence[int], addresses: Sequence[str]) -> None:
        words = [host.label, server_id, ",".join(map(str, ports)), ",".join(addresses)]
        self._label = host.label
        self._process = host.popen(
            [sys.executable, "-m", "netns_tests.bed.quic", *words],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._wait_until_ready()

    def take_server_id(self, server_id: str) -> None:
        """CONFIG:HEX for all connection IDs from now on, those of open connections included."""
        assert self._process.stdin
        self._process.stdin.write(f"{server_id}\n")
        self._process.stdin.flush()
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        assert self._process.stdout
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{self._label}: QUIC server did not start")


class QuicClient:
    """A client's connection with one stream. Its packets move during its calls only, through the socket it has then."""

    def __init__(self, local: socket.socket, timeout_s: float = 10) -> None:
        """local: a UDP socket that is connected to the server, the client's from now on. TimeoutError."""
        self._socket, self._server = local, local.getpeername()
        self._quic = unroutable_connection()
        self._handshake_completed = False
        self._received = b""
        self._quic.connect(self._server, now=time.monotonic())
        try:
            self._drive(lambda: self._handshake_completed, timeout_s)
        except BaseException:
            self._socket.close()
            raise
        self._stream = self._quic.get_next_available_stream_id()

    @property
    def connection_id(self) -> bytes:
        """The server's, which the client sends to."""
        return self._quic._peer_cid.cid

    def ask(self, question: str, timeout_s: float = 10) -> str:
        """Say a line on the stream, hear LABEL LINE. TimeoutError if no server answers that knows the connection."""
        self._quic.send_stream_data(self._stream, question.encode() + b"\n")
        return self.hear(timeout_s)

    def hear(self, timeout_s: float = 10) -> str:
        """The next line of the stream."""
        self._drive(lambda: b"\n" in self._received, timeout_s)
        line, _, self._received = self._received.partition(b"\n")
        return line.decode()

    def rebind(self, local: socket.socket) -> None:
        """Go on from another socket with the same connection ID, as behind a NAT that has forgotten the flow."""
        self._socket.close()
        self._socket = local

    def migrate(self, local: socket.socket) -> None:
        """Go on from another socket with another connection ID, once there is one: RFC 9000, section 9.5."""
        self._drive(lambda: bool(self._quic._peer_cid_available), timeout_s=10)
        self._quic.change_connection_id()
        self.rebind(local)

    def close(self) -> None:
        """Tell the server, and be gone."""
        self._quic.close()
        self._send()
        self._socket.close()

    def _drive(self, done: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError(f"QUIC: no response within {timeout_s:g} s")
            self._send()
            self._wait(deadline)
            self._take_events()

    def _send(self) -> None:
        for datagram, _ in self._quic.datagrams_to_send(now=time.monotonic()):
            self._socket.send(datagram)

    def _wait(self, deadline: float) -> None:
        """For a datagram, the connection's timer or the deadline."""
        timer = self._quic.get_timer() or deadline
        wait_s = max(0, min(timer, deadline) - time.monotonic())
        if select.select([self._socket], [], [], wait_s)[0]:
            self._quic.receive_datagram(self._socket.recv(2000), self._server, now=time.monotonic())
        elif time.monotonic() >= timer:
            self._quic.handle_timer(now=time.monotonic())

    def _take_events(self) -> None:
        while event := self._quic.next_event():
            if isinstance(event, StreamDataReceived):
                self._received += event.data
            elif isinstance(event, HandshakeCompleted):
                self._handshake_completed = True
            elif isinstance(event, ConnectionTerminated):
                raise ConnectionError(f"QUIC: {event.reason_phrase or event.error_code}")


def unroutable_connection() -> QuicConnection:
    """A client draws the first ID it sends to, and may draw one that names a server: not this client."""
    configuration = QuicConfiguration(verify_mode=ssl.CERT_NONE, server_name="vip")
    while True:
        quic = QuicConnection(configuration=configuration)
        if configuration_of(quic.original_destination_connection_id) == UNROUTABLE:
            return quic


def connected_socket(host: Host, local: tuple[str, int], server: tuple[str, int]) -> socket.socket:
    """UDP, from an address and port of the host to a server's."""
    family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
    with host.entered():
        made = socket.socket(family, socket.SOCK_DGRAM)
    made.bind(local)
    made.connect(server)
    return made


def main(arguments: Sequence[str]) -> None:
    label, server_id, ports, addresses = arguments
    asyncio.run(serve_echo(label, server_id, ports.split(","), addresses.split(",")))


if __name__ == "__main__":
    main(sys.argv[1:])
