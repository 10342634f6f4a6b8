"""Where a packet goes by the tables, and the words for it; against the program itself it is tested in netns_tests."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Any

import pytest

from lb.dataplane.allocation import Allocation
from lb.explain.documents import document
from lb.explain.output import lines
from lb.explain.packet import ACK, RST, SYN, Flow, Kind, Packet, make_frame
from lb.explain.reasons import (
    NS,
    Choice,
    Explanation,
    FlowEntry,
    FoundService,
    Member,
    Outcome,
    Reply,
    Slot,
    Source,
    Stage,
    choose,
    disagreement,
    found_by,
    members_reached,
)
from lb.hashing.ring import pack
from lb.model.state import Mode
from lb.model.vip import Address, Vip

CLIENT, VIP = ip_address("192.0.2.7"), ip_address("203.0.113.10")
FLOW = Flow(6, CLIENT, 40000, VIP, 443)
NOW_NS = 1_000_000 * NS
MACS = [bytes([2, 0, 0, 0, 0, 0x10 + number]) for number in range(4)]
OWN_MAC = bytes.fromhex("020000000002")


def member(number: int, **fields: Any) -> Member:
    return Member(
        **{
            "number": number,
            "address": ip_address(f"10.1.0.1{number}"),
            "port": 443,
            "uid": 100 + number,
            "source": ip_address("10.1.0.2"),
            "ifindex": 3,
            "source_mac": OWN_MAC,
            "destination_mac": MACS[number],
            "is_resolved": True,
        }
        | fields
    )


def served(mode: Mode = Mode.DR, *options: str, vip: str = "203.0.113.10:443", **fields: Any) -> FoundService:
    allocation = Allocation(Vip.parse(vip), mode, 0, 0, 251, 0, 16, 3600, 300, changed_ns=NOW_NS)
    return FoundService(allocation, frozenset(options), **fields)


@dataclass
class FakeTables:
    """One service, each slot of which has the same word."""

    serves: FoundService | None = field(default_factory=served)
    slot_word: int = pack(1)
    alive: tuple[int, ...] = (1, 2, 3)
    flows: dict[Flow, FlowEntry] = field(default_factory=dict)
    nat_flows: dict[Flow, FlowEntry] = field(default_factory=dict)
    replies: dict[Flow, Reply] = field(default_factory=dict)
    fragments: dict[int, FlowEntry] = field(default_factory=dict)
    sources: dict[Address, int] = field(default_factory=dict)
    names: dict[tuple[int, bytes], int] = field(default_factory=dict)
    now_ns: int = NOW_NS
    seed: int = 1
    udp_timeout_s: int = 120

    def service_number(self, _address: Address, port: int, _protocol: int) -> int | None:
        return 0 if self.serves and port == 443 else None

    def service_of_source(self, _number: int, client: Address) -> int | None:
        return self.sources.get(client)

    def service(self, _number: int) -> FoundService | None:
        return self.serves

    def word(self, _service: FoundService, _slot: int) -> int:
        return self.slot_word

    def member(self, _service: FoundService, number: int) -> Member | None:
        return member(number) if number in self.alive else None

    def members(self, _service: FoundService) -> list[Member]:
        return [member(number) for number in self.alive]

    def named_member(self, _service: FoundService, config: int, server_id: bytes) -> int | None:
        return self.names.get((config, server_id))

    def flow(self, flow: Flow) -> FlowEntry | None:
        return self.flows.get(flow)

    def nat_flow(self, flow: Flow) -> FlowEntry | None:
        return self.nat_flows.get(flow)

    def nat_reply(self, flow: Flow) -> Reply | None:
        return self.replies.get(flow)

    def fragment(self, packet: Packet) -> FlowEntry | None:
        return self.fragments.get(packet.datagram)

    def member_at(self, place: int) -> tuple[FoundService, Member] | None:
        return (self.serves, member(place)) if self.serves else None


def tcp(flags: int = SYN) -> Packet:
    return Packet(FLOW, Kind.TCP, flags)


def udp(payload: bytes = b"") -> Packet:
    return Packet(FLOW._replace(protocol=17), Kind.UDP, payload=payload)


def where(packet: Packet, **tables: Any) -> tuple[Source | None, int]:
    choice = choose(packet, FakeTables(**tables))
    return choice.source, choice.member.number if choice.member else 0


RECORDED = {FLOW: FlowEntry(3, 103, NOW_NS)}
IN_TRANSITION = pack(1, previous=2, track=True)


def test_stable_slot_has_one_member_for_all_flows() -> None:
    assert {where(tcp(flags), flows=RECORDED) for flags in (SYN, ACK)} == {(Source.RING_CURRENT, 1)}


def test_slot_in_transition_gives_new_flows_to_current_and_older_ones_to_previous() -> None:
    assert where(tcp(SYN), slot_word=IN_TRANSITION) == (Source.RING_CURRENT, 1)
    assert where(tcp(ACK), slot_word=IN_TRANSITION) == (Source.RING_PREVIOUS, 2)
    assert where(tcp(ACK), slot_word=IN_TRANSITION, alive=(1,)) == (Source.RING_CURRENT, 1)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (FlowEntry(3, 103, NOW_NS), (Source.FLOW_TABLE, 3)),
        (FlowEntry(3, 999, NOW_NS), (Source.RING_CURRENT, 1)),
        (FlowEntry(3, 103, NOW_NS, closing=True), (Source.RING_CURRENT, 1)),
        (FlowEntry(3, 103, NOW_NS - 3601 * NS), (Source.RING_CURRENT, 1)),
    ],
    ids=["living", "of another member", "closed", "timed out"],
)
def test_flow_table_decides_as_long_as_its_entry_holds(entry: FlowEntry, expected: tuple[Source, int]) -> None:
    assert where(tcp(SYN), slot_word=IN_TRANSITION, flows={FLOW: entry}) == expected


def test_udp_is_older_than_the_change_for_the_time_of_its_timeout() -> None:
    assert where(udp(), slot_word=IN_TRANSITION) == (Source.RING_PREVIOUS, 2)
    assert where(udp(), slot_word=IN_TRANSITION, now_ns=NOW_NS + 121 * NS) == (Source.RING_CURRENT, 1)


def test_affinity_asks_for_the_client_in_the_place_of_the_flow() -> None:
    client = Flow(6, CLIENT, 0, VIP, 443)
    tables = FakeTables(served(Mode.DR, "affinity"), IN_TRANSITION, flows={client: FlowEntry(3, 103, NOW_NS)})
    choice = choose(tcp(), tables)
    assert (choice.source, choice.affinity) == (Source.FLOW_TABLE, True)


def test_connection_id_comes_before_the_ring() -> None:
    quic = served(Mode.DR, "quic", quic_lengths=(2, 0, 0, 0, 0, 0, 0, 0))
    packet = udp(b"\x40\x03\xab\xcdnonce")
    assert where(packet, serves=quic, names={(0, b"\xab\xcd"): 2}) == (Source.CONNECTION_ID, 2)
    assert where(packet, serves=quic, names={}) == (Source.RING_CURRENT, 1)


def test_nat_table_comes_before_the_ring_and_ends_with_the_connection() -> None:
    entry = FlowEntry(2, 102, NOW_NS, port=2000, timeout_s=60)
    nat = served(Mode.NAT)
    assert where(tcp(ACK), serves=nat, nat_flows={FLOW: entry}) == (Source.NAT_TABLE, 2)
    assert where(tcp(SYN), serves=nat, nat_flows={FLOW: replace(entry, state=2)}) == (Source.RING_CURRENT, 1)
    assert where(tcp(ACK), serves=nat, nat_flows={FLOW: replace(entry, seen_ns=0)}) == (Source.RING_CURRENT, 1)
    assert where(tcp(RST), serves=nat) == (None, 0)
    assert where(tcp(ACK), serves=nat, slot_word=IN_TRANSITION) == (Source.RING_PREVIOUS, 2)


def test_reply_is_known_by_the_nat_table() -> None:
    backwards = Flow(6, ip_address("10.1.0.12"), 443, ip_address("10.1.0.2"), 2000)
    tables = FakeTables(replies={backwards: Reply(FLOW, 2, 2, MACS[0], OWN_MAC)})
    choice = choose(Packet(backwards, Kind.TCP, ACK), tables)
    assert (choice.source, choice.request, choice.member) == (Source.NAT_REPLY, FLOW, member(2))


def test_later_fragment_follows_the_first() -> None:
    later = Packet(FLOW._replace(source_port=0, destination_port=0), Kind.LATER_FRAGMENT, datagram=77)
    assert where(later, fragments={77: FlowEntry(3, 103)}) == (Source.FRAGMENT_TABLE, 3)
    assert where(later) == (None, 0)


def test_client_from_elsewhere_is_refused() -> None:
    only = served(Mode.DR, "only_sources")
    assert choose(tcp(), FakeTables(only)).refused
    assert where(tcp(), serves=only, sources={CLIENT: 0}) == (Source.RING_CURRENT, 1)


@pytest.mark.parametrize(
    ("vip", "words"),
    [
        ("203.0.113.10:443", "exact address, exact port"),
        ("203.0.113.10:0", "exact address, any port"),
        ("203.0.113.0/24:443-450", "prefix 203.0.113.0/24, ports 443-450"),
        ("203.0.113.10:443@eu", "exact address, exact port, set eu by the client's prefix"),
    ],
)
def test_how_a_service_is_found_is_told(vip: str, words: str) -> None:
    assert found_by(served(vip=vip)) == words


# Program and tables


def sent_to(number: int) -> Outcome:
    return Outcome("redirect", "forwarded", make_frame(FLOW, SYN, OWN_MAC, MACS[number]), (3, "eth1"))


def test_program_that_goes_by_the_tables_needs_no_remark() -> None:
    tables = FakeTables()
    choice, outcome = choose(tcp(), tables), sent_to(1)
    assert disagreement(choice, outcome, members_reached(outcome, tcp(), served(), tables)) is None


def test_program_that_chooses_another_member_is_told_from_the_tables() -> None:
    tables = FakeTables()
    choice, outcome = choose(tcp(), tables), sent_to(2)
    reached = members_reached(outcome, tcp(), served(), tables)
    assert reached == [member(2)]
    assert disagreement(choice, outcome, reached) == (
        "the program chose 10.1.0.12:443; according to the maps it is 10.1.0.11:443"
    )


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("drop_no_backend", "the program found no backend; according to the maps it is 10.1.0.11:443"),
        ("pass_not_a_service", "the program found no service; according to the maps it is 203.0.113.10:443/tcp"),
        ("drop_syn_limit", None),
    ],
)
def test_packet_that_did_not_go_where_the_tables_lead(reason: str, words: str | None) -> None:
    assert disagreement(choose(tcp(), FakeTables()), Outcome("drop", reason, b""), []) == words


# Words


def explanation(choice: Choice, outcome: Outcome, **fields: Any) -> Explanation:
    frame = make_frame(FLOW, SYN, MACS[0], OWN_MAC)
    return Explanation("eth0", frame, tcp(), outcome, choice, choice.member, **fields)


def test_forwarded_packet_in_lines() -> None:
    choice = Choice(served(), Source.RING_CURRENT, member(1), Slot(0xABCD, 17, IN_TRANSITION))
    names = ("10.1.0.11:443", "10.1.0.12:443")
    told = explanation(choice, sent_to(1), slot_members=names, hop_interface="eth1")
    assert lines(document(told), colour=False) == [
        "packet     02:00:00:00:00:10 > 02:00:00:00:00:02",
        "           IPv4 192.0.2.7 > 203.0.113.10, ttl 64, TCP 40000 > 443 [S]",
        "in         eth0",
        "verdict    forwarded: out on eth1",
        "reason     forwarded",
        "service    203.0.113.10:443/tcp, exact address, exact port, mode dr",
        "slot       17 of 251, hash 000000000000abcd: current 10.1.0.11:443, previous 10.1.0.12:443, flows tracked",
        "member     10.1.0.11:443, from the ring (current)",
        "next hop   02:00:00:00:00:11 on eth1, from 02:00:00:00:00:02",
        "bytes out  54 (in: 54)",
        "           02:00:00:00:00:02 > 02:00:00:00:00:11",
        "           IPv4 192.0.2.7 > 203.0.113.10, ttl 64, TCP 40000 > 443 [S]",
    ]


def test_dropped_packet_in_lines_has_a_fix() -> None:
    told = explanation(Choice(served()), Outcome("drop", "drop_no_backend", b""))
    assert lines(document(told), colour=False)[3:] == [
        "verdict    dropped: no backend available",
        "reason     drop_no_backend",
        "fix        add a backend, or set a weight above 0: see xdp-lb backend list",
        "service    203.0.113.10:443/tcp, exact address, exact port, mode dr",
    ]


def test_rule_that_stopped_a_packet_in_lines_and_json() -> None:
    stage = Stage("filter", 7, "xdp_lb_filter", "rule 2: drop tcp")
    told = explanation(Choice(), Outcome("drop", None, b"", stages=(stage,)))
    assert lines(document(told), colour=False)[3:] == [
        "verdict    dropped by another program",
        "stopped by filter rule 2: drop tcp",
        "fix        xdp-lb filter list",
    ]
    assert document(told)["ended_by"] == [
        {"place": "filter", "program": "xdp_lb_filter", "program_id": 7, "rule": "rule 2: drop tcp"}
    ]


def test_disagreement_is_shown_as_a_bug() -> None:
    told = explanation(Choice(served(), Source.RING_CURRENT, member(1)), sent_to(2), disagreement="this is not that")
    assert lines(document(told), colour=False)[-1] == "BUG        this is not that: please report this"
    assert document(told)["disagreement"] == "this is not that"
