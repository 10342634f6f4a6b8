"""The tables in which the programs record flows: which slots of a service's ring have open ones.

Enters: where a service lies. Leaves: slots, and numbers of connections. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Set

from lb.dataplane import clock
from lb.dataplane.allocation import Allocation
from lb.hashing.flow_query import FlowQuery
from lb.hashing.recorded import recorded_slots
from xdp.object import Loaded

_NS = 1_000_000_000


class FlowTables:
    """Those of one loaded object. Methods raise XdpError."""

    def __init__(self, obj: Loaded) -> None:
        self._obj = obj

    def tracked_slots(self, allocation: Allocation) -> set[int]:
        """The slots with flows in the flow table that have not timed out."""
        table, query = self._obj.map(f"flows{allocation.vip.address.version}"), self._query(allocation)
        return set().union(*(recorded_slots(keys, flows, query) for keys, flows in table.batches()))

    def open_translations(self, allocation: Allocation, slots: Set[int]) -> int:
        """How many translated connections (mode nat) that are open have their slot among these."""
        table, query = self._obj.map(f"nat_flows{allocation.vip.address.version}"), self._query(allocation)
        now, closing = clock.now_ns(), ~self._obj.types.enum("nat_state")["NAT_ESTABLISHED"]
        return sum(
            query.slot(key) in slots
            for key, flow in table.items()
            if query.includes(key, flow) and now <= flow.seen_ns + flow.timeout_s * _NS and not flow.state & closing
        )

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
