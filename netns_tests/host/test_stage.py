"""`xdp-lb stage`: C functions of users in the packets' path, in front of the balancer, behind its verdict, and alone.

A compile takes seconds of a core, so a run is shared by all that can be seen of it.
"""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lb.stages.compile import BCC, check_installed
from lb.stages.source import EXAMPLES
from netns_tests.bed.servers import start_http
from netns_tests.bed.stage import Documents, Running, attached, environment, running, stages, written
from netns_tests.bed.topology import XDP_LB, Bed, Host, wait_until
from netns_tests.bed.traffic import curl

PINGS = 3
CONNECTIONS = 4

check_installed()  # what is missing is named at once, not skipped


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    """A balancer of the VIP on eth0, and a client without one."""
    with Bed(backends=1) as b:
        start_http(b, b.backends[0])
        b.xdp_lb("attach", "eth0", "--vip", f"{b.vip4}:80", "--backends", b.backends[0].ipv4)
        wait_until(lambda: curl(b.client, f"http://{b.vip4}/"), "the VIP is served")
        yield b


# What the examples find of traffic that each test sends: pings of both families, and TCP connections


def finds_hello(documents: Documents, source: Host) -> bool:
    lines = [document["trace"] for document in documents if "trace" in document]
    return lines.count("hello, packet of 42 bytes") >= PINGS and lines.count("hello, packet of 62 bytes") >= PINGS


def finds_sizes(documents: Documents, source: Host) -> bool:
    (histogram,) = last(documents, "frame_bytes")["histograms"] or [{"buckets": []}]
    return any(b["low"] == 32 and b["high"] == 63 and b["count"] >= 2 * PINGS for b in histogram["buckets"])


def finds_ttls(documents: Documents, source: Host) -> bool:
    counts = {
        table: {
            bucket["value"]: bucket["count"] for histogram in found["histograms"] for bucket in histogram["buckets"]
        }
        for table in ("ttls", "hop_limits")
        if (found := last(documents, table))
    }
    return all(counts[table].get(64, 0) >= PINGS for table in ("ttls", "hop_limits"))


def finds_sources(documents: Documents, source: Host) -> bool:
    four = entries(documents, "sources4").get(source.ipv4, {"packets": 0})
    six = entries(documents, "sources6").get(source.ipv6, {"bytes": 0})
    return bool(four["packets"] >= PINGS and six["bytes"] >= 62 * PINGS)


def finds_syns(documents: Documents, source: Host) -> bool:
    network = source.interfaces[0].network.ipv4(0)
    return bool(entries(documents, "syns").get(network, 0) >= CONNECTIONS)


def finds_events(documents: Documents, source: Host) -> bool:
    events = [(document["event"], document["data"]) for document in documents if "event" in document]
    pings4 = [d for table, d in events if (table, d["protocol"]) == ("packets4", socket.IPPROTO_ICMP)]
    pings6 = [d for table, d in events if (table, d["protocol"]) == ("packets6", socket.IPPROTO_ICMPV6)]
    fours = [d for d in pings4 if (d["source"], d["bytes"]) == (source.ipv4, 42)]
    sixes = [d for d in pings6 if (d["source"], d["bytes"]) == (source.ipv6, 62)]
    return len(fours) >= PINGS and len(sixes) >= PINGS


FINDS: dict[str, Callable[[Documents, Host], bool]] = {
    "hello": finds_hello,
    "packet_sizes": finds_sizes,
    "ttls": finds_ttls,
    "top_sources": finds_sources,
    "syn_rate": finds_syns,
    "packet_events": finds_events,
}
AT = {
    "hello": "xdp",
    "packet_sizes": "xdp",
    "ttls": "xdp",
    "syn_rate": "xdp",
    "top_sources": "xdp-exit",
    "packet_events": "xdp-exit",
}
PLACES = {"xdp": [1, 2, 3, 4], "xdp-exit": [6, 7]}


def last(documents: Documents, table: str) -> dict[str, Any]:
    return next((d for d in reversed(documents) if d.get("table") == table), {"histograms": [], "entries": []})


def entries(documents: Documents, table: str) -> dict[str, Any]:
    return {entry["key"]: entry["value"] for entry in last(documents, table)["entries"]}


def has_found(name: str, stage: Running, source: Host) -> bool:
    return FINDS[name](stage.documents, source)


def send_pings(source: Host, target: Host) -> None:
    assert all(source.pings(address) for address in (target.ipv4, target.ipv6) for _ in range(PINGS))


def connect(source: Host, address: str, port: int) -> None:
    for _ in range(CONNECTIONS):
        with source.entered(), socket.socket() as connection:
            connection.settimeout(5)
            connection.connect_ex((address, port))


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.c")} == FINDS.keys() == AT.keys()


# In the balancer's path


@pytest.fixture(scope="module")
def path_of_six(bed: Bed) -> Iterator[dict[str, Running]]:
    """All examples, started at once: four in front, which is all places there, and two behind."""
    found = {name: Running(bed, bed.lb, EXAMPLES / f"{name}.c", "--at", at) for name, at in AT.items()}
    for stage in found.values():
        stage.wait_for_start()
    yield found
    for stage in found.values():
        if stage.process.poll() is None:
            stage.end()


def test_examples_see_the_traffic_of_a_balancer(bed: Bed, path_of_six: dict[str, Running]) -> None:
    """Also when its tables have grown."""
    grow_tables(bed)
    send_pings(bed.client, bed.lb)
    assert all(curl(bed.client, f"http://{bed.vip4}/") == "b1" for _ in range(CONNECTIONS))
    for name, stage in path_of_six.items():
        wait_until(partial(has_found, name, stage, bed.client), f"{name} has found its packets")


def grow_tables(bed: Bed) -> None:
    before = program_id(bed)
    bed.xdp_lb("vip", "add", f"[{bed.vip6}]:80", "--backends", bed.backends[0].ipv6)
    assert program_id(bed) != before


def program_id(bed: Bed) -> int:
    return int(json.loads(bed.xdp_lb("status", "--json").stdout)["interfaces"][0]["program_id"])


def test_stages_are_listed_in_their_places(bed: Bed, path_of_six: dict[str, Running]) -> None:
    found = {Path(stage["file"]).stem: stage for stage in stages(bed, bed.lb)}
    assert {name: stage["at"] for name, stage in found.items()} == AT
    for at, places in PLACES.items():
        assert sorted(stage["place"] for stage in found.values() if stage["at"] == at) == places
    assert {name: stage["pid"] for name, stage in found.items()} == {
        name: stage.process.pid for name, stage in path_of_six.items()
    }
    assert {(stage["interface"], stage["state"]) for stage in found.values()} == {("eth0", "running")}
    assert len({stage["program_id"] for stage in found.values()}) == len(AT)


def test_a_fifth_stage_in_front_finds_no_place(bed: Bed, path_of_six: dict[str, Running]) -> None:
    done = bed.xdp_lb("stage", "run", "eth0", str(EXAMPLES / "hello.c"), check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "xdp-lb: all 4 places at xdp are in use: see xdp-lb stage list\n"


def test_stop_ends_stages_with_their_last_tables_and_leaves_the_traffic(
    bed: Bed, path_of_six: dict[str, Running]
) -> None:
    lines = bed.xdp_lb("stage", "stop", "--all").stdout.splitlines()
    assert len(lines) == len(AT)
    for stage in path_of_six.values():
        assert stage.process.wait(timeout=20) == 0
    assert path_of_six["top_sources"].tables["sources4"]["final"]
    assert stages(bed, bed.lb) == []
    assert curl(bed.client, f"http://{bed.vip4}/") == "b1"


DROPS = """\
BPF_ARRAY(packets, u64, 1);

int stage(struct xdp_md *ctx)
{
	packets.atomic_increment(0);
	return XDP_DROP;
}
"""


def test_a_stage_that_drops_works_on_when_it_is_killed_until_somebody_stops_it(bed: Bed) -> None:
    with running(bed, bed.lb, written(bed, "drops.c", DROPS)) as stage:
        assert not bed.client.pings(bed.lb.ipv4, timeout_s=0.5)
        assert bed.backends[0].pings(bed.lb.interfaces[1].ipv4)  # which comes in on eth1
        wait_until(lambda: stage.tables["packets"]["entries"], "packets are counted")
        stage.process.kill()
        stage.process.wait()
        (orphan,) = stages(bed, bed.lb)
        assert (orphan["state"], orphan["file"]) == ("orphaned", str(bed.directory / "drops.c"))
        assert not bed.client.pings(bed.lb.ipv4, timeout_s=0.5)
        bed.xdp_lb("stage", "stop", str(orphan["number"]))
    assert stages(bed, bed.lb) == []
    wait_until(lambda: bed.client.pings(bed.lb.ipv4), "packets go on")


def test_a_stage_behind_the_balancer_drops_by_its_verdict(bed: Bed) -> None:
    path = written(
        bed,
        "forwarded.c",
        """\
BPF_HASH(verdicts, u32, u64);

static int no_forwarding(struct xdp_md *ctx)
{
	struct xdp_lb_verdict *verdict = xdp_lb_verdict();

	if (!verdict)
		return XDP_PASS;
	verdicts.atomic_increment(verdict->action);
	return verdict->reason == XDP_LB_FORWARDED ? XDP_DROP : XDP_PASS;
}
""",
    )
    with running(bed, bed.lb, path, "--at", "xdp-exit", "--function", "no_forwarding") as stage:
        assert bed.client.pings(bed.lb.ipv4)
        failed = bed.client.run(["curl", "-sS", "--max-time", "1", f"http://{bed.vip4}/"], check=False)
        assert failed.returncode == 28  # timed out
        redirect, passed = 4, 2
        wait_until(lambda: {redirect, passed} <= entries(stage.documents, "verdicts").keys(), "both are counted")
        stage.end(signal.SIGTERM)
    assert curl(bed.client, f"http://{bed.vip4}/") == "b1"


# Alone on an interface


@pytest.mark.parametrize("name", FINDS)
def test_example_sees_the_traffic_of_a_plain_interface(bed: Bed, name: str) -> None:
    with running(bed, bed.client, EXAMPLES / f"{name}.c") as stage:
        assert [(each["place"], each["state"]) for each in stages(bed, bed.client)] == [(None, "running")]
        assert attached(bed.client) == ["eth0"]
        send_pings(bed.lb, bed.client)
        connect(bed.lb, bed.client.ipv4, 81)
        wait_until(partial(has_found, name, stage, bed.lb), f"{name} has found its packets")
    assert (stages(bed, bed.client), attached(bed.client)) == ([], [])


def test_a_killed_stage_on_a_plain_interface_leaves_nothing(bed: Bed) -> None:
    with running(bed, bed.client, EXAMPLES / "syn_rate.c", "-D", "LIMIT=0") as stage:
        connect_once(bed.lb, bed.client.ipv4, refused=False)
        wait_until(lambda: "dropped" in stage.tables and stage.tables["dropped"]["entries"], "SYNs are dropped")
        refused = bed.xdp_lb("stage", "run", "eth0", str(EXAMPLES / "hello.c"), on=bed.client, check=False)
        assert "(xdp_lb_stage) is attached" in refused.stderr
        stage.process.kill()
        stage.process.wait()
    assert stages(bed, bed.client) == []
    wait_until(lambda: attached(bed.client) == [], "the program is off")
    connect_once(bed.lb, bed.client.ipv4, refused=True)


def connect_once(source: Host, address: str, *, refused: bool) -> None:
    with source.entered(), socket.socket() as connection:
        connection.settimeout(0.5)
        with pytest.raises(ConnectionRefusedError if refused else TimeoutError):
            connection.connect((address, 81))


def test_an_interface_without_native_xdp_is_served_by_generic_xdp_with_a_warning(bed: Bed) -> None:
    with running(bed, bed.client, written(bed, "drops.c", DROPS), interface="lo") as stage:
        assert "xdp-lb: warning: lo: using generic XDP, which is slow" in stage.errors
        assert not bed.client.pings("127.0.0.1", timeout_s=0.5)
    assert bed.client.pings("127.0.0.1")


# What goes wrong


def refusal(bed: Bed, path: Path, *words: str) -> str:
    done = bed.xdp_lb("stage", "run", "eth0", str(path), *words, on=bed.client, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert (stages(bed, bed.client), attached(bed.client)) == ([], [])
    return str(done.stderr)


def test_what_the_compiler_says_names_file_and_line(bed: Bed) -> None:
    path = written(bed, "broken.c", "int stage(struct xdp_md *ctx)\n{\n\treturn nonsense;\n}\n")
    assert f"{path}:3:9: error: use of undeclared identifier 'nonsense'" in refusal(bed, path)


def test_what_the_verifier_says_is_shown(bed: Bed) -> None:
    reads = "int stage(struct xdp_md *ctx)\n{\n\treturn *(u8 *)(long)ctx->data ? XDP_PASS : XDP_DROP;\n}\n"
    assert "invalid access to packet" in refusal(bed, written(bed, "unchecked.c", reads))


def test_without_the_balancer_there_is_no_verdict_to_be_behind(bed: Bed) -> None:
    said = refusal(bed, EXAMPLES / "hello.c", "--at", "xdp-exit")
    assert said == "xdp-lb: eth0: the balancer is not attached: use --at xdp\n"


@pytest.mark.parametrize(
    ("hidden", "packages"),
    [
        ([BCC], ["python3-bpfcc"]),
        ([Path("/lib/modules")], ["linux-headers-"]),
        ([BCC, Path("/lib/modules")], ["python3-bpfcc", "linux-headers-"]),
    ],
)
def test_what_is_missing_is_named_with_its_packages(bed: Bed, hidden: Sequence[Path], packages: Sequence[str]) -> None:
    """In a mount namespace in which nothing is in their place."""
    hide = "".join(f"mount -t tmpfs none {path} && " for path in hidden)
    command = [str(XDP_LB), "stage", "run", "eth0", str(EXAMPLES / "hello.c")]
    done = bed.client.run(
        ["unshare", "--mount", "sh", "-c", f'{hide} exec "$@"', "sh", *command], env=environment(bed), check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    words = done.stderr.split("apt install ")[1].split()
    assert len(words) == len(packages)
    assert all(word.startswith(package) for word, package in zip(words, packages, strict=True))


def test_detach_of_the_balancer_ends_its_stages(bed: Bed) -> None:
    with running(bed, bed.lb, written(bed, "drops.c", DROPS)) as stage:
        bed.xdp_lb("detach")
        assert stage.process.wait(timeout=20) == 1
        assert stage.errors.endswith("xdp-lb: eth0: stage stopped: the balancer was detached\n")
        assert stages(bed, bed.lb) == []
