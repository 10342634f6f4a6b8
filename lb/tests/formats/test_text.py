from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

import pytest

from lb.formats import documents
from lb.formats import text as output
from lb.hashing.ring import Plan
from lb.model.conditions import Condition
from lb.model.forwarding import UNKNOWN, Attachment, Counters, OpenConnections
from lb.model.options import Options, parse_network
from lb.model.report import BackendStatus, Change, InterfaceStatus, Report, ServiceStatus, Status
from lb.model.state import Backend, Interface, Mode, Service, XdpMode
from lb.model.vip import Vip

WEB = Vip.parse("10.0.0.1:80/tcp")
DNS6 = Vip.parse("[2001:db8::1]:53/udp")
FIRST, SECOND, THIRD = (Backend.parse(f"10.0.0.1{n}:80") for n in (1, 2, 3))
WEB_SERVICE = Service(WEB, Mode.NAT, (FIRST, SECOND))
DNS6_SERVICE = Service(DNS6, Mode.DR, (Backend.parse("[2001:db8::11]:53"),), 251, 60)
PLAN = Plan(slots=16381, moved=5461, minimum=5460, in_transition=5461)

MANY, ONE, SOME = OpenConnections(37), OpenConnections(1), OpenConnections(12_345, estimated=True)


def changed(after: Service, plan: Plan | None = PLAN) -> Change:
    return Change(after.vip, WEB_SERVICE, after, plan)


def lines(text: str) -> list[str]:
    return text.strip("\n").splitlines()


STATUS = Status(
    netns="lb1",
    loaded=True,
    interfaces=(
        InterfaceStatus(Interface("eth0"), Attachment("eth0", "native", 37)),
        InterfaceStatus(Interface("eth1", XdpMode.GENERIC), None),
    ),
    services=(
        ServiceStatus(
            replace(WEB_SERVICE, backends=(FIRST, replace(SECOND, draining=True, weight=3))),
            slots_in_transition=8190,
            backends=(
                BackendStatus(FIRST, True, Counters(12_345, 9_876_543, 9999, 1_234_567_890, 801), open=MANY),
                BackendStatus(replace(SECOND, draining=True, weight=3), True, Counters(5, 300, 4, 9000, 1), open=ONE),
            ),
        ),
        ServiceStatus(
            DNS6_SERVICE,
            slots_in_transition=0,
            backends=(BackendStatus(DNS6_SERVICE.backends[0], False, Counters()),),
        ),
    ),
    answered={"answered_echo": 7},
    drops={"drop_no_backend": 0, "drop_malformed": 12},
    passes={"pass_no_service": 1_234_567},
    maps={"rings": 4_194_304},
)


def status_of(*services: Service, down: Collection[Backend] = ()) -> Status:
    """Loaded; all backends are resolved, and those in `down` are down."""
    dead = Condition(down=True, share=100, why="connect: refused", since=0)
    return Status(
        "default",
        True,
        (InterfaceStatus(Interface("eth0"), Attachment("eth0", "native", 37)),),
        tuple(
            ServiceStatus(
                s, 0, tuple(BackendStatus(b, True, Counters(), dead if b in down else None) for b in s.backends)
            )
            for s in services
        ),
        {},
        {},
    )


def test_status_shows_interfaces_services_in_trouble_first_and_why_packets_were_not_balanced() -> None:
    assert output.status_lines(STATUS, colour=False) == lines("""
network namespace lb1

INTERFACE  XDP       PROGRAM
eth0       native         37
eth1       detached        -

[2001:db8::1]:53/udp: dr, 1 backend, ring 251
  BACKEND            WEIGHT  STATE       OPEN  CONNS  PACKETS  BYTES  REPLIES  BYTES
  [2001:db8::11]:53       1  unresolved     -      0        0      0        0      0

10.0.0.1:80/tcp: nat, 2 backends, ring 16381, 8190 slots in transition
  BACKEND            WEIGHT  STATE     OPEN  CONNS  PACKETS  BYTES  REPLIES  BYTES
  10.0.0.11:80            1  active      37    801    12.3k  9.88M     9999  1.23G
  10.0.0.12:80            3  draining     1      1        5    300        4   9000
  total                                  38    802    12.3k  9.88M    10.0k  1.23G

REASON           PACKETS
answered_echo          7
drop_malformed        12
pass_no_service    1.23M
""")


def test_status_shows_how_often_clients_tried_again_where_they_did() -> None:
    counts = (Counters(12_345, 9_876_543, 9999, 1_234_567_890, 801, 2), Counters(5, 300, 4, 9000, 1, 12_345))
    service = STATUS.services[0]
    backends = tuple(replace(b, counters=c) for b, c in zip(service.backends, counts, strict=True))
    status = replace(STATUS, services=(replace(service, backends=backends), STATUS.services[1]))
    found = output.status_lines(status, colour=False)
    assert found[11:15] == lines("""
  BACKEND            WEIGHT  STATE     OPEN  CONNS  RETRIES  PACKETS  BYTES  REPLIES  BYTES
  10.0.0.11:80            1  active      37    801        2    12.3k  9.88M     9999  1.23G
  10.0.0.12:80            3  draining     1      1    12.3k        5    300        4   9000
  total                                  38    802    12.3k    12.3k  9.88M    10.0k  1.23G
""")
    assert found[7].split()[:5] == ["BACKEND", "WEIGHT", "STATE", "OPEN", "CONNS"]
    assert "RETRIES" not in found[7]


def test_open_connections_are_marked_where_they_are_estimated_and_unknown_ones_make_the_sum_unknown() -> None:
    def cells(*each: OpenConnections) -> list[str]:
        web = STATUS.services[0]
        backends = tuple(replace(b, open=o) for b, o in zip(web.backends, each, strict=True))
        found = output.status_lines(replace(STATUS, services=(replace(web, backends=backends),)), colour=False)
        return [line.split()[column] for line, column in zip(found[8:11], (3, 3, 1), strict=True)]

    assert cells(MANY, SOME) == ["37", "~12.3k", "~12.4k"]
    assert cells(SOME, UNKNOWN) == ["~12.3k", "-", "-"]


def test_status_of_the_longest_ipv4_backends_fits_90_columns() -> None:
    backend = Backend.parse("255.255.255.254:65535@65535")
    busy = ServiceStatus(
        replace(WEB_SERVICE, backends=(backend,)),
        slots_in_transition=16381,
        backends=(BackendStatus(backend, True, Counters(*[999_499_999_999] * 5), open=SOME),),
    )
    text = output.status_lines(replace(STATUS, services=(busy,)), colour=False)
    assert max(map(len, text)) <= 90


def many() -> list[Service]:
    """Eleven, of which the last drains one backend and the second but last both."""
    services = [Service(Vip.parse(f"10.0.0.{n}:80"), Mode.NAT, (FIRST, SECOND)) for n in range(100, 111)]
    one = services[-1].changing_backend(FIRST, lambda b: replace(b, draining=True))
    both = replace(services[-2], backends=tuple(replace(b, draining=True) for b in services[-2].backends))
    return [*services[:-2], both, one]


def test_more_than_ten_services_are_shown_in_a_line_each_those_in_trouble_first() -> None:
    text = output.status_lines(status_of(*many()), colour=False)
    assert len(text) == 3 + 12
    assert text[3:6] == lines("""
VIP                MODE  BACKENDS  OPEN  CONNS  PACKETS  BYTES  REPLIES  BYTES  STATE
10.0.0.109:80/tcp  nat          2     -      0        0      0        0      0  2 draining
10.0.0.100:80/tcp  nat          2     -      0        0      0        0      0  active
""")
    assert text[-1].endswith("1 draining")
    text = output.status_lines(status_of(*many(), down=[SECOND]), colour=False)
    assert text[-1].endswith("1 down, 1 draining")


def test_one_service_is_shown_with_its_backends_however_many_there_are() -> None:
    text = output.service_lines(status_of(*many()).of_service(many()[0].vip), colour=False)
    assert [line.split()[0] for line in text] == [
        "10.0.0.100:80/tcp:",
        "BACKEND",
        "10.0.0.11:80",
        "10.0.0.12:80",
        "total",
    ]


def test_what_is_in_trouble_is_shown_alone() -> None:
    text = output.trouble_lines(status_of(*many(), down=[SECOND]), colour=False)
    assert [line.split()[0] for line in text if "10.0.0.12:80" in line and "down" in line]
    assert not any("10.0.0.11:80" in line for line in text)
    calm = many()[0]
    assert output.trouble_lines(status_of(calm), colour=False) == ["1 service: nothing is down"]
    assert output.trouble_lines(replace(status_of(calm), loaded=False), colour=False) == [
        "not attached: run xdp-lb attach IFACE"
    ]
    named = output.trouble_lines(replace(status_of(calm), netns="lb1"), colour=False)
    assert named == ["network namespace lb1", "", "1 service: nothing is down"]
    (drained,) = output.trouble_lines(status_of(*many()), colour=False)
    assert drained == "10.0.0.109:80/tcp: nat, 2 backends, ring 16381, no backend takes new connections"
    (_, interface) = output.trouble_lines(replace(STATUS, netns="default", services=()), colour=False)
    assert interface.split() == ["eth1", "detached", "-"]


def test_an_address_is_never_shortened() -> None:
    backend = Backend.parse("[2001:db8:1111:2222:3333:4444:5555:6666]:65535")
    service = replace(DNS6_SERVICE, mode=Mode.NAT, backends=(backend,))
    assert str(backend) in "".join(output.backends_table(status_of(service), colour=False))


def test_colour_changes_nothing_but_colour() -> None:
    plain = output.status_lines(STATUS, colour=False)
    coloured = output.status_lines(STATUS, colour=True)
    without = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in coloured]
    assert coloured != plain
    assert without == plain


def test_status_of_nothing_tells_how_to_start() -> None:
    nothing = Status("default", False, (), (), {}, {})
    assert output.status_lines(nothing, colour=False) == ["no services: start with xdp-lb attach IFACE --backends A,B"]


def test_backends_are_not_called_unresolved_while_nothing_is_attached() -> None:
    text = output.status_lines(replace(STATUS, loaded=False), colour=False)
    assert text[0] == ("network namespace lb1: not attached: run xdp-lb attach IFACE")
    assert "unresolved" not in "\n".join(text)


def test_service_list() -> None:
    assert output.services_table([WEB_SERVICE, DNS6_SERVICE], colour=False) == lines("""
VIP                   MODE  BACKENDS   RING  FLOW TIMEOUT
10.0.0.1:80/tcp       nat          2  16381        3600 s
[2001:db8::1]:53/udp  dr           1    251          60 s
""")


PREFIX = parse_network("10.7.0.0/16")
TUNNELLED = replace(
    WEB_SERVICE, mode=Mode.GUE, options=Options(affinity_s=300, sources=(PREFIX,), mss=1400, second_chance=True)
)
NEAR = Service(Vip.parse("10.0.0.1:80@near"), Mode.NAT, (THIRD,), options=Options(sources=(PREFIX,)))


def test_service_list_has_options_and_sets_where_there_are_some() -> None:
    wide = replace(DNS6_SERVICE, vip=Vip.parse("[2001:db8:2::/64]:8000-8999/udp"), backends=())
    assert output.services_table([TUNNELLED, NEAR, wide], colour=False) == lines("""
VIP                              MODE  BACKENDS   RING  FLOW TIMEOUT
10.0.0.1:80/tcp                  gue          2  16381        3600 s
  affinity 300 s, sources 10.7.0.0/16, mss 1400, second chance on
10.0.0.1:80/tcp@near             nat          1  16381        3600 s
  sources 10.7.0.0/16
[2001:db8:2::/64]:8000-8999/udp  dr           0    251          60 s
""")


def test_many_options_stay_within_80_columns_and_whole() -> None:
    prefixes = tuple(parse_network(f"10.{n}.0.0/16") for n in range(30))
    services = [replace(WEB_SERVICE, options=Options(sources=prefixes, echo=True))]
    text = output.services_table(services, colour=False)
    assert max(map(len, text)) <= 80
    words = " ".join(line.strip() for line in text[2:])
    assert words == f"sources {' '.join(map(str, prefixes))}, echo on"


def test_backend_list_has_server_ids_where_there_are_some() -> None:
    named = replace(FIRST, server_ids=("0:0a1b", "1:00c4d2"))
    quic = Service(Vip.parse("10.0.0.1:80/udp"), Mode.NAT, (named, SECOND))
    assert output.backends_table(status_of(quic), colour=False) == lines("""
VIP              BACKEND       WEIGHT  STATE   SERVER IDS
10.0.0.1:80/udp  10.0.0.11:80       1  active  0:0a1b 1:00c4d2
10.0.0.1:80/udp  10.0.0.12:80       1  active
""")


def test_backend_list() -> None:
    draining = WEB_SERVICE.changing_backend(SECOND, lambda b: replace(b, draining=True, weight=20))
    assert output.backends_table(status_of(draining, DNS6_SERVICE, down=[FIRST]), colour=False) == lines("""
VIP                   BACKEND            WEIGHT  STATE
10.0.0.1:80/tcp       10.0.0.11:80            1  down
10.0.0.1:80/tcp       10.0.0.12:80           20  draining
[2001:db8::1]:53/udp  [2001:db8::11]:53       1  active
""")


def test_empty_lists_say_what_to_do() -> None:
    assert output.services_table([], colour=False) == ["no services: add one with xdp-lb vip add"]
    assert output.backends_table(status_of(), colour=False) == ["no backends: add one with xdp-lb backend add"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            Change(WEB, None, WEB_SERVICE, PLAN),
            "10.0.0.1:80/tcp: added: nat, 2 backends, ring 16381",
        ),
        (
            Change(WEB, None, replace(WEB_SERVICE, backends=())),
            "10.0.0.1:80/tcp: added: nat, no backends, ring 16381",
        ),
        (Change(WEB, WEB_SERVICE, None), "10.0.0.1:80/tcp: removed"),
        (
            changed(WEB_SERVICE.with_backend(THIRD)),
            "10.0.0.1:80/tcp: backend 10.0.0.13:80 added: 5461 of 16381 slots move (minimum 5460)",
        ),
        (
            changed(WEB_SERVICE.with_backend(replace(THIRD, weight=3)), plan=None),
            "10.0.0.1:80/tcp: backend 10.0.0.13:80 (weight 3) added",
        ),
        (
            changed(WEB_SERVICE.without_backend(FIRST), plan=None),
            "10.0.0.1:80/tcp: backend 10.0.0.11:80 removed",
        ),
        (
            changed(WEB_SERVICE.changing_backend(FIRST, lambda b: replace(b, draining=True)), plan=None),
            "10.0.0.1:80/tcp: backend 10.0.0.11:80 draining",
        ),
        (
            changed(
                WEB_SERVICE.changing_backend(FIRST, lambda b: replace(b, weight=7)),
                replace(PLAN, moved=0),
            ),
            "10.0.0.1:80/tcp: backend 10.0.0.11:80 weight 1 -> 7: no slot moves",
        ),
        (
            changed(replace(WEB_SERVICE, flow_timeout_s=60), plan=None),
            "10.0.0.1:80/tcp: flow timeout 3600 s -> 60 s",
        ),
        (
            Change(WEB, None, TUNNELLED),
            "10.0.0.1:80/tcp: added: gue, 2 backends, ring 16381,"
            " affinity 300 s, sources 10.7.0.0/16, mss 1400, second chance on",
        ),
        (
            Change(WEB, TUNNELLED, replace(TUNNELLED, options=Options(mss=1360, echo=True)), replace(PLAN, moved=0)),
            "10.0.0.1:80/tcp: affinity 300 s -> off, sources 10.7.0.0/16 -> any, mss 1400 -> 1360, echo off -> on,"
            " second chance on -> off: no slot moves",
        ),
    ],
)
def test_a_change_is_one_sentence(change: Change, sentence: str) -> None:
    assert output.change_sentence(change) == sentence


def test_what_names_a_backend_is_told() -> None:
    before = Service(Vip.parse("10.0.0.1:80/udp"), Mode.NAT, (replace(FIRST, server_ids=("0:aa",)), SECOND))
    after = replace(before, backends=(FIRST, replace(SECOND, server_ids=("0:aa", "1:bb"))))
    assert output.change_sentence(Change(before.vip, before, after)) == (
        "10.0.0.1:80/udp: backend 10.0.0.11:80 server id 0:aa -> none, backend 10.0.0.12:80 server id none -> 0:aa 1:bb"
    )
    added = replace(before, backends=(*before.backends, replace(THIRD, server_ids=("0:cc",))))
    assert output.change_sentence(Change(before.vip, before, added)) == (
        "10.0.0.1:80/udp: backend 10.0.0.13:80 (server id 0:cc) added"
    )


def test_a_service_that_is_only_stored_may_change_in_every_way() -> None:
    after = replace(WEB_SERVICE, mode=Mode.DR, ring_size=251)
    assert output.change_sentence(changed(after, plan=None)) == ("10.0.0.1:80/tcp: mode nat -> dr, ring 16381 -> 251")


def test_the_end_of_a_drain_is_told() -> None:
    draining = WEB_SERVICE.changing_backend(FIRST, lambda b: replace(b, draining=True))
    assert output.change_sentence(Change(WEB, draining, WEB_SERVICE)) == (
        "10.0.0.1:80/tcp: backend 10.0.0.11:80 active again"
    )


def test_several_backends_of_one_change_share_its_line() -> None:
    after = WEB_SERVICE.with_backend(THIRD).without_backend(FIRST)
    assert output.change_sentence(changed(after)) == (
        "10.0.0.1:80/tcp: backend 10.0.0.11:80 removed, backend 10.0.0.13:80 added:"
        " 5461 of 16381 slots move (minimum 5460)"
    )


def test_notes_are_indented_under_what_has_happened() -> None:
    report = Report(
        changes=(Change(WEB, None, WEB_SERVICE),),
        attached=(Attachment("eth0", "native", 37),),
        detached=("eth1",),
        notes=("eth0 has 10.0.0.1",),
    )
    assert output.report_lines(report) == [
        "eth0: attached, native XDP",
        "eth1: detached",
        "10.0.0.1:80/tcp: added: nat, 2 backends, ring 16381",
        "  eth0 has 10.0.0.1",
    ]
    assert output.report_lines(Report(notes=("stored, not active",))) == ["stored, not active"]


def test_every_line_of_a_dry_run_says_so() -> None:
    report = Report(changes=(Change(WEB, WEB_SERVICE, None),), dry_run=True)
    assert output.report_lines(report) == ["dry run: 10.0.0.1:80/tcp: removed"]


def test_a_report_of_nothing_is_not_silent() -> None:
    assert output.report_lines(Report()) == ["nothing to change"]
    assert output.diff_lines(Report()) == ["nothing to change"]


def test_diff_tells_of_options() -> None:
    report = Report(
        changes=(
            Change(NEAR.vip, None, NEAR),
            changed(replace(WEB_SERVICE, options=Options(echo=True, syn_limit=1000)), replace(PLAN, moved=0)),
        )
    )
    assert output.diff_lines(report) == lines("""
+ service 10.0.0.1:80/tcp@near: nat, 1 backend, ring 16381, sources 10.7.0.0/16
  + backend 10.0.0.13:80
~ service 10.0.0.1:80/tcp: syn limit off -> 1000/s, echo off -> on: no slot moves
1 service added, 1 service changed
""")


def test_diff_marks_services_and_backends() -> None:
    after = (
        WEB_SERVICE.with_backend(THIRD).without_backend(FIRST).changing_backend(SECOND, lambda b: replace(b, weight=3))
    )
    report = Report(
        changes=(
            Change(DNS6, None, DNS6_SERVICE),
            changed(after),
            Change(Vip.parse("10.0.0.2:80"), WEB_SERVICE, None),
        ),
        dry_run=True,
    )
    assert output.diff_lines(report) == lines("""
+ service [2001:db8::1]:53/udp: dr, 1 backend, ring 251
  + backend [2001:db8::11]:53
~ service 10.0.0.1:80/tcp: 5461 of 16381 slots move (minimum 5460)
  - backend 10.0.0.11:80
  ~ backend 10.0.0.12:80 (weight 1 -> 3)
  + backend 10.0.0.13:80
- service 10.0.0.2:80/tcp
dry run: 1 service added, 1 service changed, 1 service removed
""")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (9999, "9999"),
        (10_000, "10.0k"),
        (12_345, "12.3k"),
        (999_499, "999k"),
        (999_500, "1.00M"),
        (1_234_567, "1.23M"),
        (2**64, "18.4E"),
    ],
)
def test_large_numbers_have_three_figures(number: int, text: str) -> None:
    assert output.short(number) == text


PLAIN_OPTIONS = {
    "affinity_s": 0,
    "sources": [],
    "syn_limit": 0,
    "syn_limit_of_source": 0,
    "mss": 0,
    "echo": False,
    "tunnel_sources": [],
    "gue_port": 6080,
    "outer_checksum": False,
    "second_chance": False,
    "health": "",
    "slow_start_s": 0,
    "fail_closed": False,
    "vip_address": True,
}


def test_status_document_has_the_documented_keys_and_exact_numbers() -> None:
    assert documents.status_document(STATUS) == {
        "netns": "lb1",
        "loaded": True,
        "interfaces": [
            {"name": "eth0", "xdp_mode": "native", "attached": True, "program_id": 37},
            {"name": "eth1", "xdp_mode": "generic", "attached": False, "program_id": None},
        ],
        "services": [
            {
                "vip": "10.0.0.1:80/tcp",
                "address": "10.0.0.1",
                "prefix_length": 32,
                "port": 80,
                "last_port": 80,
                "protocol": "tcp",
                "set": "",
                "mode": "nat",
                "ring_size": 16381,
                "flow_timeout_s": 3600,
                "options": PLAIN_OPTIONS,
                "slots_in_transition": 8190,
                "open": {"connections": 38, "estimated": False},
                "packets": 12_350,
                "bytes": 9_876_843,
                "reply_packets": 10_003,
                "reply_bytes": 1_234_576_890,
                "connections": 802,
                "repeated_syns": 0,
                "backends": [
                    {
                        "backend": "10.0.0.11:80",
                        "address": "10.0.0.11",
                        "port": 80,
                        "weight": 1,
                        "draining": False,
                        "server_ids": [],
                        "resolved": True,
                        "state": "active",
                        "share": 100,
                        "why": "",
                        "since": None,
                        "open": {"connections": 37, "estimated": False},
                        "packets": 12_345,
                        "bytes": 9_876_543,
                        "reply_packets": 9999,
                        "reply_bytes": 1_234_567_890,
                        "connections": 801,
                        "repeated_syns": 0,
                    },
                    {
                        "backend": "10.0.0.12:80",
                        "address": "10.0.0.12",
                        "port": 80,
                        "weight": 3,
                        "draining": True,
                        "server_ids": [],
                        "resolved": True,
                        "state": "draining",
                        "share": 100,
                        "why": "",
                        "since": None,
                        "open": {"connections": 1, "estimated": False},
                        "packets": 5,
                        "bytes": 300,
                        "reply_packets": 4,
                        "reply_bytes": 9000,
                        "connections": 1,
                        "repeated_syns": 0,
                    },
                ],
            },
            {
                "vip": "[2001:db8::1]:53/udp",
                "address": "2001:db8::1",
                "prefix_length": 128,
                "port": 53,
                "last_port": 53,
                "protocol": "udp",
                "set": "",
                "mode": "dr",
                "ring_size": 251,
                "flow_timeout_s": 60,
                "options": PLAIN_OPTIONS,
                "slots_in_transition": 0,
                "open": {"connections": None, "estimated": False},
                "packets": 0,
                "bytes": 0,
                "reply_packets": 0,
                "reply_bytes": 0,
                "connections": 0,
                "repeated_syns": 0,
                "backends": [
                    {
                        "backend": "[2001:db8::11]:53",
                        "address": "2001:db8::11",
                        "port": 53,
                        "weight": 1,
                        "draining": False,
                        "server_ids": [],
                        "resolved": False,
                        "state": "active",
                        "share": 100,
                        "why": "",
                        "since": None,
                        "open": {"connections": None, "estimated": False},
                        "packets": 0,
                        "bytes": 0,
                        "reply_packets": 0,
                        "reply_bytes": 0,
                        "connections": 0,
                        "repeated_syns": 0,
                    }
                ],
            },
        ],
        "answered": {"answered_echo": 7},
        "drops": {"drop_no_backend": 0, "drop_malformed": 12},
        "passes": {"pass_no_service": 1_234_567},
        "noted": {},
        "maps": {"rings": 4_194_304},
        "outdated": None,
        "config_fault": None,
    }


def test_service_document_has_what_a_wide_vip_a_set_and_options_are() -> None:
    wide = Vip.parse("[2001:db8:2::/64]:8000-8999/udp@near")
    named = replace(Backend.parse("2001:db8::11"), server_ids=("0:0a1b",))
    options = Options(sources=(parse_network("2001:db8:7::/48"),), affinity_s=60)
    assert documents.service_document(Service(wide, Mode.DR, (named,), 251, 60, options)) == {
        "vip": "[2001:db8:2::/64]:8000-8999/udp@near",
        "address": "2001:db8:2::",
        "prefix_length": 64,
        "port": 8000,
        "last_port": 8999,
        "protocol": "udp",
        "set": "near",
        "mode": "dr",
        "ring_size": 251,
        "flow_timeout_s": 60,
        "options": {**PLAIN_OPTIONS, "affinity_s": 60, "sources": ["2001:db8:7::/48"]},
        "backends": [
            {
                "backend": "[2001:db8::11]:0",
                "address": "2001:db8::11",
                "port": 0,
                "weight": 1,
                "draining": False,
                "server_ids": ["0:0a1b"],
            }
        ],
    }


def test_report_document_has_the_documented_keys() -> None:
    report = Report(
        changes=(replace(changed(WEB_SERVICE.without_backend(FIRST)), ending=UNKNOWN),),
        ending=SOME,
        attached=(Attachment("eth0", "generic", 37, "eth0: the driver has no native XDP"),),
        detached=("eth1",),
        notes=("a note",),
        warnings=("a warning",),
    )
    service = {
        "vip": "10.0.0.1:80/tcp",
        "address": "10.0.0.1",
        "prefix_length": 32,
        "port": 80,
        "last_port": 80,
        "protocol": "tcp",
        "set": "",
        "mode": "nat",
        "ring_size": 16381,
        "flow_timeout_s": 3600,
        "options": PLAIN_OPTIONS,
    }
    plain = {"port": 80, "weight": 1, "draining": False, "server_ids": []}
    first, second = ({"backend": f"{a}:80", "address": a, **plain} for a in ("10.0.0.11", "10.0.0.12"))
    assert documents.report_document(report) == {
        "dry_run": False,
        "changes": [
            {
                "vip": "10.0.0.1:80/tcp",
                "change": "change",
                "before": {**service, "backends": [first, second]},
                "after": {**service, "backends": [second]},
                "plan": {"slots": 16381, "moved": 5461, "minimum": 5460, "in_transition": 5461},
                "ending": {"connections": None, "estimated": False},
            }
        ],
        "ending": {"connections": 12_345, "estimated": True},
        "attached": [{"name": "eth0", "xdp_mode": "generic", "program_id": 37}],
        "detached": ["eth1"],
        "notes": ["a note"],
        "warnings": ["a warning", "eth0: the driver has no native XDP"],
    }


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        (None, ""),
        (OpenConnections(0), ", ends no open connections"),
        (ONE, ", ends 1 open connection"),
        (MANY, ", ends 37 open connections"),
        (SOME, ", ends ~12345 open connections"),
        (OpenConnections(0, estimated=True), ", ends ~0 open connections"),
        (UNKNOWN, ", ends an unknown number of open connections"),
    ],
)
def test_a_change_says_how_many_open_connections_it_ends(ending: OpenConnections | None, said: str) -> None:
    smaller = replace(changed(WEB_SERVICE.without_backend(FIRST)), ending=ending)
    moves = "backend 10.0.0.11:80 removed: 5461 of 16381 slots move (minimum 5460)"
    assert output.change_sentence(smaller) == f"10.0.0.1:80/tcp: {moves}{said}"
    gone = Change(WEB, WEB_SERVICE, None, ending=ending)
    assert output.change_sentence(gone) == f"10.0.0.1:80/tcp: removed{said}"
    report = Report((gone,), ending=ending, dry_run=True)
    assert output.diff_lines(report)[-1] == f"dry run: 1 service removed{said}"


def test_detaching_says_how_many_open_connections_it_ends() -> None:
    report = Report(detached=("eth0",), ending=MANY, notes=("a note",))
    assert output.report_lines(report) == ["eth0: detached", "  ends 37 open connections", "  a note"]


def test_a_report_and_a_status_are_the_same_when_they_are_read_back() -> None:
    report = Report((replace(changed(WEB_SERVICE.without_backend(FIRST)), ending=SOME),), ending=SOME)
    assert documents.read_report(documents.report_document(report)) == report
    assert [each.open for each in documents.read_status(documents.status_document(STATUS)).services] == [
        OpenConnections(38),
        UNKNOWN,
    ]
