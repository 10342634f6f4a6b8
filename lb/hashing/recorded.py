"""Slots of flows that the flow table has on record."""

from __future__ import annotations

from typing import Any

from lb.hashing import native
from lb.hashing.flow_query import FlowQuery


@native.compiled(native.recorded_slots)
def recorded_slots(keys: Any, flows: Any, query: FlowQuery) -> set[int]:
    """The slots of those entries of the flow table that the query includes.

    keys: a ctypes array of struct flow_key4 or flow_key, as the family of the queried address wants.
    flows: one of struct flow, as long. ValueError if the lengths differ.
    """
    return {query.slot(key) for key, flow in zip(keys, flows, strict=True) if query.includes(key, flow)}
