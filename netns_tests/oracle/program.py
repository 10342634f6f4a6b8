"""The balancer's program with services put straight into its maps, run on frames through BPF_PROG_TEST_RUN.

Enters what the model takes too: Settings, Services, frames. Leaves an Outcome, whose reason is the counter that moved.
"""

from __future__ import annotations

import contextlib
import itertools
from array import array
from collections.abc import Collection, Iterator
from dataclasses import asdict
from random import Random
from socket import AF_INET, AF_INET6, IPPROTO_ICMP, IPPROTO_ICMPV6
from typing import Any

from lb.dataplane.lookup_maps import vip_filter
from netns_tests.oracle.model import Count, Member, Outcome, Prefix, Service, Settings, Slot, narrowest
from netns_tests.oracle.packets import Verdict
from xdp.object import LB_OBJECT, BpfObject

SLOTS = 1 << 10
SERVICES = 1 << 4
PLACES = 1 << 4  # for the members of a service, the first of them for none
FLOWS = 1 << 14  # far more than a test has: least-recently-used maps evict nothing
PREVIOUS_SHIFT, TRACK = 15, 1 << 30
NO_SERVICE, VIP_ADDRESS = 0xFFFFFFFF, 0xFFFFFFFE
FLOW_TABLES = ("flows4", "flows6", "nat_flows4", "nat_flows6", "nat_replies4", "nat_replies6", "fragments")
SERVICE_TABLES = (
    *("services4", "services6", "networks4", "networks6", "ranges4", "ranges6", "sources4", "sources6"),
    "quic_members",
)
MAP_SIZES = {
    "services4": 3 * SERVICES,
    "services6": 3 * SERVICES,
    "services": SERVICES,
    "syn_times": SERVICES,
    "quic_members": SERVICES * PLACES,
    "members": SERVICES * PLACES,
    "counters": SERVICES * PLACES,
    "source_syn_times": FLOWS,
} | dict.fromkeys(FLOW_TABLES, FLOWS)


class LoadedProgram:
    """The program and its maps, its clock in the test's hands."""

    def __init__(self, bpf: BpfObject) -> None:
        self.bpf = bpf
        self._program = bpf.program("xdp_lb")
        self._reasons = list(bpf.types.enum("reason"))
        self._modes = bpf.types.enum("mode")
        self._flags = bpf.types.enum("member_flag")
        self._options = bpf.types.enum("service_option")
        self._services = bpf.map("services").view()
        self._members = bpf.map("members").view()
        self._rings = bpf.map("rings").view()
        self._words_in_line = len(self._rings[0].words)
        self._control = bpf.variable("control")
        self._counted = self._read_reasons()

    def run(self, frame: bytes, ingress_ifindex: int) -> Outcome:
        """Run it once on a frame of 14 bytes or more. AssertionError when more than one reason was counted."""
        run = self._program.test_run(frame, ingress_ifindex=ingress_ifindex)
        assert run.verdict != Verdict.ABORTED, frame.hex()
        reason, noted = self._reasons_counted()
        return Outcome(Verdict(run.verdict), reason, run.data, noted)

    def run_uncounted(self, frame: bytes, ingress_ifindex: int) -> bytes:
        """The frame that leaves; for several threads at once, which share the counters."""
        return self._program.test_run(frame, ingress_ifindex=ingress_ifindex).data

    def set_clock(self, now_ns: int) -> None:
        self._control.test_clock_ns = now_ns

    def wait_for_flows_until(self, then_ns: int) -> None:
        """Until then, flows of the program before may be missing; 0: none are."""
        self._control.whole_ns = then_ns

    def install(self, services: list[Service], echo: Collection[bytes] = ()) -> None:
        """Put these services in the place of those before; flows stay. A service's number is its place in the list.

        echo: the addresses whose echo requests are answered.
        """
        self._clear(*SERVICE_TABLES)
        ring_base = 0
        for number, service in enumerate(services):
            self._put_slots(service.slots, ring_base)
            self._put_members(service, number * PLACES)
            self._put_service(service, number, ring_base)
            self._put_sources(service, number)
            self._put_server_ids(service, number)
            ring_base += len(service.slots)
        self._put_addresses(services)
        self._put_echo(echo)
        self._control.epoch += 1

    def forget(self) -> None:
        """Empty every table of flows, the limits, the SYNs that were seen, and the counters of members."""
        self._clear(*FLOW_TABLES, "source_syn_times")
        for name in ("counters", "paces"):
            counters = self.bpf.map(name)
            for index in range(len(counters)):
                counters.set_total(index, counters.value_type())
        for number in range(SERVICES):
            self.bpf.map("syn_times")[number] = 0
        seen = self.bpf.map("seen_syns")
        seen.put_raw(array("I", range(len(seen))).tobytes(), bytes(len(seen) * seen.value_stride))

    def forget_replies(self) -> None:
        """As if every translation's reply direction had been evicted."""
        self._clear("nat_replies4", "nat_replies6")

    def entries(self, table: str) -> list[tuple[Any, Any]]:
        return list(self.bpf.map(table).items())

    def count(self, member: int, service: int = 0) -> Count:
        """By their numbers."""
        total = self.bpf.map("counters").total(service * PLACES + member)
        return Count(**{name: getattr(total, name) for name, _ in total._fields_})

    def _clear(self, *tables: str) -> None:
        for table in tables:
            entries = self.bpf.map(table)
            for key, _ in list(entries.items()):
                del entries[key]

    def _put_slots(self, slots: list[Slot], ring_base: int) -> None:
        for slot_number, slot in enumerate(slots, ring_base):
            word = slot.current | slot.previous << PREVIOUS_SHIFT | TRACK * slot.track
            self._rings[slot_number // self._words_in_line].words[slot_number % self._words_in_line] = word

    def _put_members(self, service: Service, base: int) -> None:
        for number in range(PLACES):
            member = service.members.get(number)
            self._members[base + number] = self._member(member, base + number) if member else type(self._members[0])()

    def _member(self, member: Member, index: int) -> Any:
        made = type(self._members[0])(uid=member.uid, index=index, port=member.port, mtu=member.mtu)
        made.address[:], made.source[:] = words(member.address), words(member.source)
        made.hop.ifindex = member.hop.ifindex
        made.hop.destination[:], made.hop.source[:] = member.hop.destination, member.hop.source
        made.source_bits = member.source_bits
        made.flags = self._flags["MEMBER_ALIVE"] * member.alive | self._flags["MEMBER_RESOLVED"] * member.resolved
        made.flags |= self._flags["MEMBER_IP6"] * (version(member.address) == 6)
        return made

    def _put_service(self, service: Service, number: int, ring_base: int) -> None:
        made = type(self._services[0])(
            ring_base=ring_base,
            ring_size=len(service.slots),
            member_base=number * PLACES,
            member_count=PLACES,
            changed_ns=service.changed_ns,
            flow_timeout_s=service.flow_timeout_s,
            affinity_s=service.affinity_s,
            options=self._option_bits(service),
            mode=self._modes[f"MODE_{service.mode.upper()}"],
            in_use=1,
            mss=service.mss,
            gue_port=service.gue_port,
            syn_limit=service.syn_limit,
            syn_limit_of_source=service.syn_limit_of_source,
            number=number,
            first_port=service.ports.start,
            last_port=service.ports.stop - 1,
            prefix_length=service.prefix_length,
            family=AF_INET if version(service.address) == 4 else AF_INET6,
            protocol=service.protocol,
        )
        for config, length in service.quic_lengths.items():
            made.quic_lengths[config] = length
        made.address[:] = words(service.address)
        self._services[number] = made

    def _option_bits(self, service: Service) -> int:
        asked = {
            "OPTION_SOURCES": service.sources,
            "OPTION_ONLY_SOURCES": service.only_sources,
            "OPTION_SYN_LIMIT": service.syn_limit,
            "OPTION_SYN_LIMIT_OF_SOURCE": service.syn_limit_of_source,
            "OPTION_MSS": service.mss,
            "OPTION_AFFINITY": service.affinity_s,
            "OPTION_QUIC": service.server_ids,
            "OPTION_OUTER_CHECKSUM": service.outer_checksum,
            "OPTION_SECOND_CHANCE": service.second_chance,
        }
        return sum(self._options[name] for name, value in asked.items() if value)

    def _put_sources(self, service: Service, number: int) -> None:
        for (address, length), target in service.sources.items():
            sources = self.bpf.map(f"sources{version(address)}")
            sources[self._key(sources, "address", address, prefix_length=32 + length, service=number)] = target

    def _put_server_ids(self, service: Service, number: int) -> None:
        quic_members = self.bpf.map("quic_members")
        for (config, server_id), member in service.server_ids.items():
            key = quic_members.key_type(service=number, config=config)
            key.server_id[: len(server_id)] = server_id
            quic_members[key] = member

    def _put_addresses(self, services: list[Service]) -> None:
        numbers = [number for number, service in enumerate(services) if not service.is_set]
        for number in (n for n in numbers if not services[n].is_wide):
            service = services[number]
            table = self.bpf.map(f"services{version(service.address)}")
            table[self._key(table, "address", service.address, port=service.port, protocol=service.protocol)] = number
        wide = {number: services[number] for number in numbers if services[number].is_wide}
        for network in {(service.address, service.prefix_length) for service in wide.values()}:
            self._put_network(network, {n: s for n, s in wide.items() if covers(s, network)})
        self._control.wide_services = len(wide)
        own = map(services.__getitem__, numbers)
        self._put_own_addresses({service.address for service in own if has_one_address(service)})

    def _put_own_addresses(self, addresses: Collection[bytes]) -> None:
        """Half of the filter's bits are set at random: it only says which addresses are worth a look."""
        for address in addresses:
            table = self.bpf.map(f"services{version(address)}")
            table[self._key(table, "address", address)] = VIP_ADDRESS
        chance = Random(0)
        for place, word in enumerate(vip_filter(addresses)):
            self._control.vip_filter[place] = word | chance.getrandbits(64)

    def _put_network(self, network: Prefix, services: dict[int, Service]) -> None:
        """A prefix with all ports of the services under it; those of shorter prefixes have what it leaves free."""
        address, length = network
        networks, ranges = (self.bpf.map(f"{name}{version(address)}") for name in ("networks", "ranges"))
        networks[self._key(networks, "address", address, prefix_length=length)] = length
        for number, port, bits in owned_ports(services):
            key = self._key(ranges, "network", address, network_length=length, port=port)
            key.protocol, key.prefix_length = services[number].protocol, 8 * len(address) + 16 + bits
            ranges[key] = number

    def _put_echo(self, addresses: Collection[bytes]) -> None:
        for address in addresses:
            table = self.bpf.map(f"services{version(address)}")
            protocol = IPPROTO_ICMP if version(address) == 4 else IPPROTO_ICMPV6
            table[self._key(table, "address", address, protocol=protocol)] = NO_SERVICE
        self._control.echo_addresses = len(addresses)

    def _key(self, table: Any, name: str, address: bytes, **fields: int) -> Any:
        """A key that has an address in the field `name`."""
        key = table.key_type(**fields)
        if version(address) == 4:
            setattr(key, name, int.from_bytes(address, "big"))
        else:
            getattr(key, name)[:] = words(address)
        return key

    def _read_reasons(self) -> list[bytes]:
        """What each has counted, on all CPUs."""
        reasons = self.bpf.map("reasons")
        values, size = b"".join(values for _, values in reasons.raw_batches()), reasons.value_stride
        return [values[at : at + size] for at in range(0, len(values), size)]

    def _reasons_counted(self) -> tuple[str, str]:
        """The packet's own, and what was noted beside it."""
        before, self._counted = self._counted, self._read_reasons()
        moved = [name for name, old, new in zip(self._reasons, before, self._counted, strict=False) if new != old]
        noted = [name for name in moved if name.startswith("NOTED")]
        own = [name for name in moved if name not in noted]
        assert len(own) <= 1, f"counted more than once: {own}"
        return own[0] if own else "FORWARDED", noted[0] if noted else ""


def version(address: bytes) -> int:
    return 4 if len(address) == 4 else 6


def words(address: bytes) -> list[int]:
    """An address as a struct holds it: IPv4 in the first of four words."""
    padded = address.ljust(16, b"\0")
    return [int.from_bytes(padded[at : at + 4], "big") for at in range(0, 16, 4)]


def has_one_address(service: Service) -> bool:
    return service.prefix_length == 8 * len(service.address)


def covers(service: Service, network: Prefix) -> bool:
    return service.prefix_length <= network[1] and service.has(network[0])


def owned_ports(services: dict[int, Service]) -> Iterator[tuple[int, int, int]]:
    """(number of the service, port, prefix length) for the ports of each, as the model shares them out."""
    edges = {edge for s in services.values() for edge in (s.ports.start, s.ports.stop)}
    for ports in itertools.starmap(range, itertools.pairwise(sorted(edges))):
        for protocol in {service.protocol for service in services.values()}:
            here = {n: s for n, s in services.items() if s.protocol == protocol and ports.start in s.ports}
            owner = narrowest(here.values())
            yield from ((n, *prefix) for n, s in here.items() if s is owner for prefix in port_prefixes(ports))


def port_prefixes(ports: range) -> Iterator[tuple[int, int]]:
    """The fewest (port, prefix length) that are these ports together."""
    first = ports.start
    while first < ports.stop:
        size = min(first & -first or 1 << 16, 1 << (ports.stop - first).bit_length() - 1)
        yield first, 17 - size.bit_length()
        first += size


@contextlib.contextmanager
def loaded_program(settings: Settings) -> Iterator[LoadedProgram]:
    """Load it with a clock that stands still until it is set. Needs root."""
    with BpfObject.open(LB_OBJECT) as bpf:
        bpf.configure("config", test_clock=1, **asdict(settings))
        for name, entries in MAP_SIZES.items():
            bpf.resize(name, entries)
        bpf.resize("rings", SLOTS * 4 // bpf.types.struct("slot_words").words.size)
        bpf.load("xdp_lb")
        yield LoadedProgram(bpf)
