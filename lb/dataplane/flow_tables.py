"""The tables in which the programs record flows: slots with open ones, and open flows by member.

Enters: where a service lies, or members. Leaves: slots, and numbers of flows. Nothing is written. Tables are read in
batches, which changes nothing about what they evict first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from lb.dataplane import clock
from lb.dataplane.allocation import Allocation
from lb.hashing.flow_query import FlowQuery
from lb.hashing.recorded import recorded_slots
from lb.model.state import Service
from lb.model.vip import Protocol
from xdp.maps import column
from xdp.object import Loaded

_NS = 1_000_000_000
_NEVER = 1 << 64

Owner = int  # the member that a flow belongs to, as flows name it: uid << 16 | number


def owner(uid: int, number: int) -> Owner:
    return uid << 16 | number


class FlowTables:
    """Those of one loaded object. Methods raise XdpError."""

    def __init__(self, obj: Loaded) -> None:
        self._obj = obj

    def tracked_slots(self, allocation: Allocation) -> set[int]:
        """The slots with flows in the flow table that have not timed out."""
        table, query = self._obj.map(f"flows{allocation.vip.address.version}"), self._query(allocation)
        return set().union(*(recorded_slots(keys, flows, query) for keys, flows in table.batches()))

    def open_translations(self) -> Counter[Owner]:
        """Of mode nat, by owner: TCP connections from the handshake until both ends have closed or one has reset, other
        flows until they time out."""
        found: Counter[Owner] = Counter()
        for version in (4, 6):
            for keys, flows in self._obj.map(f"nat_flows{version}").batches():
                found.update(self._owners_of_open(keys, flows))
        return found

    def _owners_of_open(self, keys: Any, flows: Any) -> list[Owner]:
        now, open_states, tcp = clock.now_ns(), self._open_states, Protocol.TCP
        protocols = column(keys, "protocol")
        fields = (column(flows, name) for name in ("state", "seen_ns", "timeout_s", "uid", "member"))
        return [
            owner(uid, member)
            for protocol, state, seen_ns, timeout_s, uid, member in zip(protocols, *fields, strict=True)
            if (protocol != tcp or state in open_states) and now <= seen_ns + timeout_s * _NS
        ]

    @cached_property
    def _open_states(self) -> frozenset[int]:
        """Of a TCP connection: those in which a packet may come from either end."""
        bits = self._obj.types.enum("nat_state")
        established, reset = bits["NAT_ESTABLISHED"], bits["NAT_RESET"]
        fins = bits["NAT_CLIENT_FIN"] | bits["NAT_BACKEND_FIN"]
        return frozenset(
            state
            for state in range(sum(bits.values()) + 1)
            if state & established and not state & reset and state & fins != fins
        )

    def open_recorded(self, oldest_ns: Mapping[Owner, int]) -> Counter[Owner]:
        """Of the flow table, by owner: what has been seen since, and has not begun to close."""
        found: Counter[Owner] = Counter()
        for version in (4, 6):
            for _, flows in self._obj.map(f"flows{version}").batches():
                fields = (column(flows, name) for name in ("closing", "seen_ns", "uid", "member"))
                found.update(
                    by
                    for closing, seen_ns, uid, member in zip(*fields, strict=True)
                    if not closing and seen_ns >= oldest_ns.get(by := owner(uid, member), _NEVER)
                )
        return found

    def oldest_open_ns(self, service: Service) -> int:
        """Flows that were seen last before have timed out."""
        udp_timeout_s = int(self._obj.map(".rodata")[0].config.udp_timeout_s)
        is_tcp = service.vip.protocol is Protocol.TCP
        timeout_s = service.flow_timeout_s if is_tcp else min(service.flow_timeout_s, udp_timeout_s)
        return clock.now_ns() - timeout_s * _NS

    def _query(self, allocation: Allocation) -> FlowQuery:
        return FlowQuery(
            address=allocation.vip.address.packed,
            prefix_length=allocation.vip.prefix_length,
            ports=allocation.vip.ports,
            protocol=allocation.vip.protocol,
            oldest_ns=clock.now_ns() - allocation.flow_timeout_s * _NS,
            seed=int(self._obj.map(".rodata")[0].config.hash_seed),
            ring_size=allocation.ring_size,
        )
