"""Packets that do not fit a tunnel, or a link behind it: their senders learn what fits, and everything arrives.

All links have an MTU of 1500.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from netns_tests.bed import lanes
from netns_tests.bed.lanes import LANES, Lane
from netns_tests.bed.servers import big_file, uploaded
from netns_tests.bed.topology import Bed, Host, wait_until
from netns_tests.bed.traffic import status

MTU = 1500
UPLOAD_BYTES = 20_000_000
every_lane = pytest.mark.parametrize("lane", LANES, ids=lanes.name, indirect=True)


@pytest.fixture
def lane(lanes_bed: Bed, request: pytest.FixtureRequest) -> Lane:
    """Neither the client nor a backend knows an MTU but those of its links."""
    for host in (lanes_bed.client, *lanes_bed.backends):
        host.forget_mtus()
    return Lane(lanes_bed, *request.param)


@pytest.fixture(scope="module")
def upload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("upload") / "upload"
    with big_file().path.open("rb") as file:
        path.write_bytes(file.read(UPLOAD_BYTES))
    return path


def put(lane: Lane, upload: Path, name: str) -> Path:
    """Where the backend that took it has it."""
    arguments = ["curl", "-sSf", "--max-time", "20", "-w", "%header{x-backend}", "-T", str(upload)]
    backend = lane.bed.client.run([*arguments, f"{lane.http_url}/uploaded/{name}"]).stdout
    return uploaded(lane.bed, backend, name)


def mtu_of_tunnel(lane: Lane) -> int | None:
    """None where there is no tunnel: nothing to learn."""
    return MTU - lane.tunnel_overhead if lane.tunnel_overhead else None


@every_lane
def test_upload_arrives_whole_and_the_client_learns_what_fits(lane: Lane, upload: Path) -> None:
    arrived = put(lane, upload, lanes.name((lane.mode, lane.family, lane.outer)))
    assert arrived.read_bytes() == upload.read_bytes()
    arrived.unlink()
    assert lane.bed.client.learnt_mtu(lane.vip) == mtu_of_tunnel(lane)


DOWNLOAD_BYTES = 20_000_000
NARROW_MTU = 1400
without_nat = pytest.mark.parametrize(
    "lane", [each for each in LANES if each[0] != "nat"], ids=lanes.name, indirect=True
)


def download(lane: Lane) -> tuple[str, bool]:
    """Which backend sent the beginning of the big file, and whether it arrived whole."""
    target = lane.bed.directory / "downloaded"
    arguments = ["curl", "-sSf", "--max-time", "20", "-r", f"0-{DOWNLOAD_BYTES - 1}", "-w", "%header{x-backend}"]
    backend = lane.bed.client.run([*arguments, "-o", str(target), f"{lane.http_url}/big"]).stdout
    with big_file().path.open("rb") as file:
        return backend, target.read_bytes() == file.read(DOWNLOAD_BYTES)


@pytest.fixture
def narrow_way_back(lanes_bed: Bed) -> Iterator[None]:
    """The link from the router to the client holds less than that of the backends."""
    router = lanes_bed.router
    assert router is not None
    router.run(["ip", "link", "set", "eth0", "mtu", str(NARROW_MTU)])
    yield
    router.run(["ip", "link", "set", "eth0", "mtu", str(MTU)])


@pytest.mark.usefixtures("narrow_way_back")
@without_nat
def test_router_tells_the_backend_of_a_download_what_fits_and_no_other(lane: Lane) -> None:
    backend, whole = download(lane)
    assert whole
    client = lane.bed.client.ipv4 if lane.family == "ipv4" else lane.bed.client.ipv6
    learnt = {host.label: host.learnt_mtu(client) for host in lane.bed.backends}
    assert learnt == {"b1": None, "b2": None, "b3": None} | {backend: NARROW_MTU}


# Datagrams larger than any packet

DATAGRAM = bytes(range(250)) * 16


def echoed(host: Host, address: str, timeout_s: float) -> str | None:
    """The backend that answers a datagram of 4,000 bytes from a new port, whole; None: no answer in time."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with host.entered():
        asking = socket.socket(family, socket.SOCK_DGRAM)
    with asking:
        asking.settimeout(timeout_s)
        asking.sendto(DATAGRAM, (address, lanes.ECHO_PORT))
        try:
            label, _, answer = asking.recv(5000).partition(b" ")
        except TimeoutError:
            return None
    assert answer == DATAGRAM
    return label.decode()


@without_nat
def test_large_datagrams_arrive_whole_each_at_one_backend(lane: Lane) -> None:
    client = lane.bed.client
    # The first ones teach the client what fits the tunnel.
    wait_until(lambda: echoed(client, lane.vip, timeout_s=0.2), "a large datagram answered")
    assert client.learnt_mtu(lane.vip) == mtu_of_tunnel(lane)
    answers = [echoed(client, lane.vip, timeout_s=5) for _ in range(30)]
    assert set(answers) == {"b1", "b2", "b3"}


@pytest.mark.parametrize("lane", [each for each in LANES if each[0] == "nat"], ids=lanes.name, indirect=True)
def test_large_datagrams_through_nat_are_dropped_and_counted(lane: Lane) -> None:
    before = status(lane.bed)["drops"]["drop_fragment"]
    assert echoed(lane.bed.client, lane.vip, timeout_s=0.2) is None
    assert status(lane.bed)["drops"]["drop_fragment"] == before + 1  # those behind it are the host's
