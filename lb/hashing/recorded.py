"""Slots of flows that the flow table has on record."""

from __future__ import annotations

from typing import Any

from lb.hashing import native
from lb.hashing.flow_query import FlowQuery


@native.compiled(native.recorded_slots)
def recorded_slots(keys: Any, flows: Any, sought: FlowQuery) -> set[int]:
    """The slots of those entries of the flow table that are sought.

    keys: a ctypes array of struct flow_key4 or flow_key, as the family of the sought address wants.
    flows: one of struct flow, as long. ValueError if the lengths differ.
    """
    return {sought.slot(key) for key, flow in zip(keys, flows, strict=True) if sought.includes(key, flow)}
