"""The SSH connection of a command: where it is found, and what its packets look like."""

from __future__ import annotations

import os
from ipaddress import ip_address
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from lb.host.ssh import Connection, SshConnection, ssh_connection

TEXT = "192.0.2.7 50022 10.0.0.1 22"
CONNECTION = SshConnection(ip_address("192.0.2.7"), 50022, ip_address("10.0.0.1"), 22)
OWN_MAC = bytes.fromhex("02aabbccddee")


@pytest.mark.parametrize(
    ("text", "client", "server"),
    [
        (TEXT, "192.0.2.7", "10.0.0.1"),
        ("2001:db8::7 50022 2001:db8::1 22", "2001:db8::7", "2001:db8::1"),
        ("fe80::7%eth0 50022 fe80::1%eth0 22", "fe80::7", "fe80::1"),
        ("::ffff:192.0.2.7 50022 ::ffff:10.0.0.1 22", "192.0.2.7", "10.0.0.1"),
    ],
)
def test_both_ends_are_read(text: str, client: str, server: str) -> None:
    assert SshConnection.parse(text) == SshConnection(ip_address(client), 50022, ip_address(server), 22)


@pytest.mark.parametrize("text", ["", "192.0.2.7", "a b c d", "192.0.2.7 x 10.0.0.1 22", "192.0.2.7 0 10.0.0.1 22"])
def test_what_is_no_connection_is_none(text: str) -> None:
    assert SshConnection.parse(text) is None


def process(proc: Path, pid: int, parent: int, environment: bytes) -> None:
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "stat").write_text(f"{pid} (a name) with) S {parent} 0 0")
    (proc / str(pid) / "environ").write_bytes(environment)


def test_under_sudo_the_nearest_ancestor_that_knows_tells(tmp_path: Path) -> None:
    process(tmp_path, os.getppid(), 70, b"HOME=/\0MY_SSH_CONNECTION=none\0")
    process(tmp_path, 70, 60, f"A=b\0SSH_CONNECTION={TEXT}\0".encode())
    process(tmp_path, 60, 1, b"SSH_CONNECTION=198.51.100.1 1 10.0.0.1 22\0")
    assert ssh_connection({}, tmp_path) == CONNECTION
    assert ssh_connection({"SSH_CONNECTION": "192.0.2.8 1 10.0.0.1 22"}, tmp_path) != CONNECTION


def test_without_ssh_there_is_no_connection(tmp_path: Path) -> None:
    process(tmp_path, os.getppid(), 1, b"HOME=/\0")
    assert ssh_connection({}, tmp_path) is None


@pytest.mark.parametrize("to_server", [True, False])
def test_frames_are_those_of_the_connection_and_whole(to_server: bool) -> None:
    packets = [Ether(frame) for frame in CONNECTION.frames(to_server=to_server, own_mac=OWN_MAC)]
    assert [str(packet[TCP].flags) for packet in packets] == ["S" if to_server else "SA", "A", "PA", "PA"]
    assert max(map(len, packets)) == 14 + 20 + 20 + 1448
    for packet in packets:
        ends = (packet[IP].src, packet[TCP].sport), (packet[IP].dst, packet[TCP].dport)
        client, server = ends if to_server else ends[::-1]
        assert (client, server) == (("192.0.2.7", 50022), ("10.0.0.1", 22))
        assert (packet.dst if to_server else packet.src) == "02:aa:bb:cc:dd:ee"
        assert packet[IP].len == len(packet) - 14
        assert packet[IP].chksum == correct_checksum(packet)


def correct_checksum(packet: Packet) -> int:
    header = packet[IP].copy()
    del header.chksum
    return int(IP(bytes(header)).chksum)


def test_frames_over_ipv6_are_whole() -> None:
    connection = SshConnection.parse("2001:db8::7 50022 2001:db8::1 22")
    assert connection
    for frame in connection.frames(to_server=True):
        packet = Ether(frame)
        assert (packet[IPv6].src, packet[IPv6].dst, packet[TCP].dport) == ("2001:db8::7", "2001:db8::1", 22)
        assert packet[IPv6].plen == len(packet) - 54


def test_connection_is_told_as_it_is_read() -> None:
    assert CONNECTION.text == TEXT
    assert SshConnection.parse(CONNECTION.text) == CONNECTION


def test_refusal_says_whose_connection_it_is() -> None:
    asked = Connection.parse(TEXT)
    assert asked
    assert asked.refusal().startswith("would drop the connection from 192.0.2.7 port 50022 of this request")
    assert CONNECTION.refusal().startswith("would drop the SSH connection from 192.0.2.7 port 50022")
    assert list(asked.frames(to_server=True)) == list(CONNECTION.frames(to_server=True))
