"""The balancer's program with services put straight into its maps, run on frames through BPF_PROG_TEST_RUN.

Enters what the model takes too: Settings, Services, frames. Leaves an Outcome, whose reason is the counter that moved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from netns_tests.model import Count, Member, Outcome, Service, Settings
from netns_tests.packets import Verdict
from xdp.object import LB_OBJECT, BpfObject

SLOTS = 1 << 10
MEMBERS = 1 << 8
SERVICES = 1 << 6
FLOWS = 1 << 14  # far more than a test has: least-recently-used maps evict nothing
PREVIOUS_SHIFT, TRACK = 15, 1 << 30
FLOW_TABLES = ("flows4", "flows6", "nat_flows4", "nat_flows6", "nat_replies4", "nat_replies6")
MAP_SIZES = {
    "services4": SERVICES,
    "services6": SERVICES,
    "members": MEMBERS,
    "counters": MEMBERS,
} | dict.fromkeys(FLOW_TABLES, FLOWS)


class LoadedProgram:
    """The program and its maps, its clock in the test's hands."""

    def __init__(self, bpf: BpfObject) -> None:
        self.bpf = bpf
        self._program = bpf.program("xdp_lb")
        self._reasons = list(bpf.types.enum("reason"))
        self._modes = bpf.types.enum("mode")
        self._flags = bpf.types.enum("member_flag")
        self._members = bpf.map("members").view()
        self._rings = bpf.map("rings").view()
        self._words_in_line = len(self._rings[0].words)
        self._control = bpf.variable("control")
        self._counted = self._read_reasons()

    def run(self, frame: bytes, ingress_ifindex: int) -> Outcome:
        """Run it once on a frame of 14 bytes or more. AssertionError when more than one reason was counted."""
        run = self._program.test_run(frame, ingress_ifindex=ingress_ifindex)
        return Outcome(Verdict(run.verdict), self._reason_counted(), run.data)

    def run_uncounted(self, frame: bytes, ingress_ifindex: int) -> bytes:
        """The frame that leaves; for several threads at once, which share the counters."""
        return self._program.test_run(frame, ingress_ifindex=ingress_ifindex).data

    def set_clock(self, now_ns: int) -> None:
        self._control.test_clock_ns = now_ns

    def install(self, services: list[Service]) -> None:
        """Put these services in the place of those before; flows stay."""
        self._clear("services4", "services6")
        ring_base = member_base = 0
        for service in services:
            self._put_service(service, ring_base, member_base)
            ring_base += len(service.slots)
            member_base += max(service.members, default=0) + 1
        self._control.any_port_services = sum(service.port == 0 for service in services)

    def forget(self) -> None:
        """Empty every table of flows, and the counters of members."""
        self._clear(*FLOW_TABLES)
        counters = self.bpf.map("counters")
        for index in range(len(counters)):
            counters.set_total(index, counters.value_type())

    def forget_replies(self) -> None:
        """As if every translation's reply direction had been evicted."""
        self._clear("nat_replies4", "nat_replies6")

    def entries(self, table: str) -> list[tuple[Any, Any]]:
        return list(self.bpf.map(table).items())

    def count(self, index: int) -> Count:
        total = self.bpf.map("counters").total(index)
        return Count(**{name: getattr(total, name) for name, _ in total._fields_})

    def _clear(self, *tables: str) -> None:
        for table in tables:
            entries = self.bpf.map(table)
            for key, _ in list(entries.items()):
                del entries[key]

    def _put_service(self, service: Service, ring_base: int, member_base: int) -> None:
        for slot_number, slot in enumerate(service.slots, ring_base):
            word = slot.current | slot.previous << PREVIOUS_SHIFT | TRACK * slot.track
            self._rings[slot_number // self._words_in_line].words[slot_number % self._words_in_line] = word
        self._members[member_base] = self.bpf.types.struct("member")()
        for number in range(1, max(service.members, default=0) + 1):
            self._put_member(self._members[member_base + number], number, service.members.get(number))
        services = self.bpf.map(f"services{version(service.address)}")
        services[self._service_key(service)] = services.value_type(
            ring_base=ring_base,
            ring_size=len(service.slots),
            member_base=member_base,
            flow_timeout_s=service.flow_timeout_s,
            mode=self._modes[f"MODE_{service.mode.upper()}"],
            changed_ns=service.changed_ns,
        )

    def _service_key(self, service: Service) -> Any:
        key = self.bpf.types.struct(f"service_key{version(service.address)}")()
        key.port, key.protocol = service.port, service.protocol
        if version(service.address) == 4:
            key.address = int.from_bytes(service.address, "big")
        else:
            key.address[:] = words(service.address)
        return key

    def _put_member(self, place: Any, number: int, member: Member | None) -> None:
        place.flags = 0
        if member is None:
            return
        place.address[:], place.source[:] = words(member.address), words(member.source)
        place.hop.ifindex = member.hop.ifindex
        place.hop.destination[:], place.hop.source[:] = member.hop.destination, member.hop.source
        place.uid, place.counter, place.port, place.number = member.uid, member.counter, member.port, number
        place.flags = self._flags["MEMBER_ALIVE"] * member.alive | self._flags["MEMBER_RESOLVED"] * member.resolved

    def _read_reasons(self) -> list[int]:
        totals: list[int] = self.bpf.map("reasons").totals()
        return totals

    def _reason_counted(self) -> str:
        before, self._counted = self._counted, self._read_reasons()
        moved = [name for name, old, new in zip(self._reasons, before, self._counted, strict=False) if new != old]
        assert len(moved) <= 1, f"counted more than once: {moved}"
        return moved[0] if moved else "FORWARDED"


def version(address: bytes) -> int:
    return 4 if len(address) == 4 else 6


def words(address: bytes) -> list[int]:
    """An address as a struct holds it: IPv4 in the first of four words."""
    padded = address.ljust(16, b"\0")
    return [int.from_bytes(padded[at : at + 4], "big") for at in range(0, 16, 4)]


@contextlib.contextmanager
def loaded_program(settings: Settings) -> Iterator[LoadedProgram]:
    """Load it with a clock that stands still until it is set. Needs root."""
    with BpfObject.open(LB_OBJECT) as bpf:
        bpf.configure("config", test_clock=1, **asdict(settings))
        for name, entries in MAP_SIZES.items():
            bpf.resize(name, entries)
        bpf.resize("rings", SLOTS * 4 // bpf.types.struct("slot_words").words.size)
        bpf.load()
        yield LoadedProgram(bpf)
