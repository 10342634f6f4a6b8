"""`xdp-lb decap` on a backend: what it puts on the host, what it answers, and that it takes all of it back."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from netns_tests.bed.servers import start_udp_echo
from netns_tests.bed.topology import Bed, Host
from netns_tests.bed.tunnelled import Tunnels, decap_status, places, run_on
from netns_tests.oracle.tunnels import GUE_PORT

ARP_SETTINGS = [f"{where}/{name}" for where in ("all", "lo") for name in ("arp_ignore", "arp_announce")]


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with Bed(backends=1, one_arm=True) as b:
        yield b


@pytest.fixture
def backend(bed: Bed) -> Iterator[Host]:
    (host,) = bed.backends
    yield host
    run_on(bed, host, "detach")


def attach(bed: Bed, host: Host, *words: str) -> Any:
    return json.loads(run_on(bed, host, "attach", *words, "--json").stdout)


def refusal(bed: Bed, host: Host, *words: str) -> str:
    """The one line of a command that fails."""
    done = run_on(bed, host, *words, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    return str(done.stderr).removesuffix("\n")


def footprint(bed: Bed, host: Host) -> dict[str, object]:
    """All that attach may leave on a host."""
    links = json.loads(host.run(["ip", "-j", "-d", "link"]).stdout)
    return {
        "addresses": sorted(address(entry) for entry in addresses(host)),
        "settings": [setting(host, name) for name in ARP_SETTINGS],
        "programs": [link["ifname"] for link in links if "xdp" in link],
        "tc": host.run(["tc", "qdisc", "show", "clsact"], check=False).stdout.split(),
        "files": sorted(path.name for path in (bed.directory / "run" / "decap").glob("*.json")),
        "mounts": [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(bed.directory) in line],
    }


def addresses(host: Host) -> list[Any]:
    with host.netlink() as ip:
        return list(ip.get_addr(index=1))


def address(entry: Any) -> str:
    return str(entry.get_attr("IFA_ADDRESS"))


def setting(host: Host, name: str) -> str:
    with host.entered():
        return Path("/proc/sys/net/ipv4/conf", name).read_text().strip()


def test_detach_takes_back_exactly_what_setup_vip_did(bed: Bed, backend: Host) -> None:
    backend.sysctl("net.ipv4.conf.lo.arp_announce", 1)
    before = footprint(bed, backend)
    done = attach(bed, backend, "eth0", "--vip", f"{bed.vip4},{bed.vip6}", "--setup-vip")
    assert done["notes"] == [
        "net.ipv4.conf.all.arp_ignore: 0 -> 1",
        "net.ipv4.conf.all.arp_announce: 0 -> 2",
        "net.ipv4.conf.lo.arp_ignore: 0 -> 1",
        "net.ipv4.conf.lo.arp_announce: 1 -> 2",
        f"{bed.vip4}: added to lo",
        f"{bed.vip6}: added to lo",
    ]
    during = footprint(bed, backend)
    assert during["settings"] == ["1", "2", "1", "2"]
    assert during["addresses"] == sorted(["127.0.0.1", "::1", bed.vip4, bed.vip6])
    assert during["programs"] == ["eth0"]
    run_on(bed, backend, "detach")
    assert footprint(bed, backend) == before
    backend.sysctl("net.ipv4.conf.lo.arp_announce", 0)


def test_what_was_there_before_setup_vip_stays_after_detach(bed: Bed, backend: Host) -> None:
    with backend.netlink() as ip:
        ip.addr("add", index=1, address=bed.vip4, prefixlen=32)
    backend.sysctl("net.ipv4.conf.all.arp_ignore", 2)
    before = footprint(bed, backend)
    notes = attach(bed, backend, "eth0", "--vip", bed.vip4, "--setup-vip")["notes"]
    assert not any(bed.vip4 in note or "all.arp_ignore" in note for note in notes)
    run_on(bed, backend, "detach")
    assert footprint(bed, backend) == before
    backend.sysctl("net.ipv4.conf.all.arp_ignore", 0)
    with backend.netlink() as ip:
        ip.addr("del", index=1, address=bed.vip4, prefixlen=32)


def test_second_attach_replaces_the_configuration_and_keeps_the_counters(bed: Bed, backend: Host) -> None:
    attach(bed, backend, "eth0", "--vip", f"{bed.vip4},10.7.0.0/16", "--from", "10.99.0.0/16", "--setup-vip")
    with Tunnels(bed.client, bed.vip4, bed.vip6) as tunnels:
        tunnels.lead_to(backend.ipv4)
        with pytest.raises(ConnectionRefusedError):
            tunnels.connection(bed.vip4)
    first = decap_status(bed, backend)
    assert sorted(first["destinations"]) == ["10.7.0.0/16", bed.vip4]
    assert (first["sources"], first["gue_port"]) == (["10.99.0.0/16"], GUE_PORT)
    notes = attach(bed, backend, "eth0", "--vip", bed.vip6, "--gue-port", "7000", "--setup-vip")["notes"]
    second = decap_status(bed, backend)
    assert notes == [f"{bed.vip6}: added to lo"]
    assert (second["destinations"], second["sources"], second["gue_port"]) == ([bed.vip6], [], 7000)
    assert second["tunnels"]["gue_4_in_4"] == first["tunnels"]["gue_4_in_4"]
    assert second["tunnels"]["gue_4_in_4"]["packets"] > 0
    assert bed.vip4 not in [address(entry) for entry in addresses(backend)]


def test_attaching_again_changes_nothing(bed: Bed, backend: Host) -> None:
    words = ("eth0", "--vip", bed.vip4, "--setup-vip")
    attach(bed, backend, *words)
    before = footprint(bed, backend)
    again = attach(bed, backend, *words)
    assert (again["notes"], footprint(bed, backend)) == ([], before)


def test_no_packet_is_lost_while_the_configuration_is_replaced(bed: Bed, backend: Host) -> None:
    start_udp_echo(backend, 5300)
    attach(bed, backend, "eth0", "--vip", bed.vip4, "--setup-vip")
    with Tunnels(bed.client, bed.vip4, bed.vip6) as tunnels:
        tunnels.lead_to(backend.ipv4)
        changing = threading.Thread(target=lambda: [attach(bed, backend, "eth0", "--vip", bed.vip4) for _ in range(4)])
        changing.start()
        answered = 0
        while changing.is_alive() or answered < 100:
            assert tunnels.ask(bed.vip4, 5300, str(answered).encode()) == b"b1 " + str(answered).encode()
            answered += 1
        changing.join()


def test_interface_with_a_program_of_someone_else_is_refused_and_nothing_is_done(bed: Bed, backend: Host) -> None:
    bed.xdp_lb("attach", "eth0", "--vip", "10.99.1.200:80", "--backends", backend.ipv4)
    before = footprint(bed, bed.lb)
    line = refusal(bed, bed.lb, "attach", "eth0", "--vip", bed.vip4, "--setup-vip")
    assert line.startswith("xdp-lb: eth0: another XDP program is attached (id ")
    assert "name xdp_lb): detach it first: " in line
    assert footprint(bed, bed.lb) == before
    assert decap_status(bed, bed.lb)["interfaces"] == []
    bed.xdp_lb("detach")


def test_second_interface_that_refuses_leaves_the_first_as_it_was(bed: Bed, backend: Host) -> None:
    attach(bed, backend, "eth0", "--vip", bed.vip4)
    before = decap_status(bed, backend) | {"passes": None}  # other packets may come meanwhile
    assert refusal(bed, backend, "attach", "eth0", "eth7", "--vip", bed.vip6, "--setup-vip") == (
        "xdp-lb: interface eth7: does not exist: see ip link"
    )
    assert refusal(bed, backend, "attach", "lo", "--xdp-mode", "native", "--vip", bed.vip6, "--setup-vip")
    assert decap_status(bed, backend) | {"passes": None} == before
    assert footprint(bed, backend)["settings"] == ["0", "0", "0", "0"]


def test_host_that_will_not_take_the_packets_is_warned_of(bed: Bed, backend: Host) -> None:
    words = "eth0", "--vip", f"{bed.vip4},10.7.0.0/16", "--from", "10.99.2.0/24"
    warnings = attach(bed, backend, *words)["warnings"]
    why = "not an address of this host, so its packets are not accepted"
    assert [line for line in warnings if "tx off" not in line] == [
        f"{bed.vip4}: {why}: use --setup-vip",
        f"10.7.0.0/16: {why}: ip route add local 10.7.0.0/16 dev lo",
    ]


def test_host_that_takes_tunnel_packets_of_anybody_is_warned_of(bed: Bed, backend: Host) -> None:
    words = "eth0", "--vip", bed.vip4, "--setup-vip"
    assert any(line.startswith("no --from: any host") for line in attach(bed, backend, *words)["warnings"])
    assert not any("--from" in line for line in attach(bed, backend, *words, "--from", "10.99.2.0/24")["warnings"])


def test_host_that_answers_arp_for_the_vip_is_warned_of(bed: Bed, backend: Host) -> None:
    with backend.netlink() as ip:
        ip.addr("add", index=1, address=bed.vip4, prefixlen=32)
        warnings = attach(bed, backend, "eth0", "--vip", bed.vip4)["warnings"]
        ip.addr("del", index=1, address=bed.vip4, prefixlen=32)
    assert any(line.startswith(f"{bed.vip4}: this host answers ARP for it on eth0") for line in warnings)


def test_strict_reverse_path_filter_that_would_drop_is_warned_of(bed: Bed, backend: Host) -> None:
    backend.sysctl("net.ipv4.conf.eth0.rp_filter", 1)
    warned = [attach(bed, backend, "eth0", "--vip", bed.vip6)["warnings"]]
    with backend.netlink() as ip:
        ip.route("add", dst="default", gateway=bed.client.ipv4)
        warned.append(attach(bed, backend, "eth0", "--vip", bed.vip6)["warnings"])
        ip.route("del", dst="default", gateway=bed.client.ipv4)
    backend.sysctl("net.ipv4.conf.eth0.rp_filter", 0)
    assert [any("strict rp_filter" in line for line in lines) for lines in warned] == [True, False]


def test_detaching_one_interface_leaves_the_other(bed: Bed, backend: Host) -> None:
    before = footprint(bed, backend)
    attach(bed, backend, "lo", "eth0", "--vip", bed.vip4, "--setup-vip")
    run_on(bed, backend, "detach", "lo")
    assert [each["name"] for each in decap_status(bed, backend)["interfaces"]] == ["eth0"]
    assert bed.vip4 in [address(entry) for entry in addresses(backend)]
    assert run_on(bed, backend, "detach").stdout.startswith("eth0: detached\n")
    assert run_on(bed, backend, "detach").stdout == "nothing to change\n"
    assert footprint(bed, backend) == before


def test_status_for_people_names_what_was_counted(bed: Bed, backend: Host) -> None:
    assert run_on(bed, backend, "status").stdout == ("not attached: run xdp-lb decap attach IFACE --vip ADDR\n")
    attach(bed, backend, "eth0", "--vip", bed.vip4, "--setup-vip")
    with Tunnels(bed.client, bed.vip4, bed.vip6) as tunnels:
        tunnels.lead_to(backend.ipv4, kind="ipip")
        with pytest.raises(ConnectionRefusedError):
            tunnels.connection(bed.vip4)
    lines = run_on(bed, backend, "status").stdout.splitlines()
    assert f"decapsulating for {bed.vip4}, from any source, GUE on port 6080" in lines
    assert ["ipip_4_in_4", "1", "60"] in [line.split() for line in lines]


def test_status_in_json_has_the_keys_of_its_help(bed: Bed, backend: Host) -> None:
    keys = {"netns", "loaded", "interfaces", "destinations", "sources", "gue_port", "tunnels"}
    attach(bed, backend, "eth0", "--vip", bed.vip4)
    assert decap_status(bed, backend).keys() == keys | {"sent_to_other_member", "drops", "passes", "noted"}


# Cut short


KILLED = """
import os
from xdp.pins import Pins
Pins.{method} = lambda *_: os._exit(9)
from lb.cli.main import main
main()
"""


@pytest.mark.parametrize("method", ["put_in_force", "discard"])
@pytest.mark.parametrize("first", [True, False])
def test_attach_that_was_killed_is_finished_by_the_next_one(bed: Bed, backend: Host, first: bool, method: str) -> None:
    before = footprint(bed, backend)
    if not first:
        attach(bed, backend, "eth0", "--vip", bed.vip6, "--setup-vip")
    words = ("decap", "attach", "eth0", "--vip", bed.vip4, "--setup-vip")
    killed = backend.run(
        [sys.executable, "-c", KILLED.format(method=method), *words], check=False, env=os.environ | places(bed)
    )
    assert killed.returncode == (0 if first and method == "discard" else 9)
    attach(bed, backend, "eth0", "--vip", bed.vip4, "--setup-vip")
    status = decap_status(bed, backend)
    assert (status["destinations"], len(status["interfaces"])) == ([bed.vip4], 1)
    run_on(bed, backend, "detach")
    assert footprint(bed, backend) == before
