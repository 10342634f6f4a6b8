"""Hooks that filters run on, and the packet data available there.

A hook says which fields of its context (struct xdp_md, struct __sk_buff; <linux/bpf.h>) hold what, and how a filter
reads what lies outside the linear area.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from filters.compiler import cbpf, ebpf

NETWORK_HEADER = 14  # of an Ethernet frame

# enum bpf_prog_type, enum bpf_attach_type
_PROG_TYPE_SCHED_CLS, _PROG_TYPE_XDP, PROG_TYPE_TRACING = 3, 6, 26
_ATTACH_TYPE_XDP = 37
_F_XDP_HAS_FRAGS = 1 << 5

_XDP_DROP, _XDP_PASS = 1, 2
_TC_ACT_UNSPEC, _TC_ACT_SHOT = -1, 2

PACKET_HOST, _PACKET_OUTGOING = 0, 4  # <linux/if_packet.h>


@dataclass(frozen=True, slots=True)
class Field:
    """A 32-bit word of the context; with `big_endian` 16 bits of it are in network byte order."""

    offset: int
    big_endian: bool = False


@dataclass(frozen=True, slots=True)
class FrameField:
    """16 bits of the frame itself, in network byte order."""

    offset: int


@dataclass(frozen=True, slots=True)
class Helper:
    """A function of the kernel that takes nothing and returns a 32-bit word."""

    number: int


Source = Field | FrameField | Helper | int
"""An int is the answer itself: the hook always gives the same."""


@dataclass(frozen=True, slots=True)
class Hook:
    """`data` and `data_end`: offsets in the context. `length`: the field with the whole length, where there is one.

    `load_bytes` is the helper that reads beyond the linear area; None where all of a packet is linear. `ancillary`:
    what answers each SKF_AD_ question. `pass_verdict` passes the packet on.

    Where programs have no packet pointers, the context is a value of a map that the entry of the program fills:
    `window` in it is a copy of as much as the filter may read, `readable` says how much of the packet can be read at
    all, `packet` is the kernel's pointer to it, and `returned` what the program that is looked at has returned.
    """

    name: str
    program_type: int
    pass_verdict: int
    drop_verdict: int
    data: int
    data_end: int
    load_bytes: int | None
    ancillary: dict[int, Source] = field(hash=False)
    length: int | None = None
    expected_attach_type: int = 0
    program_flags: int = 0
    window: int | None = None
    readable: int | None = None
    packet: int | None = None
    returned: int | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def is_tc(self) -> bool:
        return self.program_type == _PROG_TYPE_SCHED_CLS


ANYWHERE: dict[int, Source] = {
    cbpf.RANDOM: Helper(ebpf.GET_PRANDOM_U32),
    cbpf.CPU: Helper(ebpf.GET_SMP_PROCESSOR_ID),
}

# At XDP the VLAN tag is still in the frame, never out of band.
_AT_XDP: dict[int, Source] = ANYWHERE | {
    cbpf.PROTOCOL: FrameField(12),
    cbpf.PKTTYPE: PACKET_HOST,  # `inbound` and `outbound` ask whether it is outgoing, which at XDP no packet is
    cbpf.IFINDEX: Field(12),
    cbpf.QUEUE: Field(16),
    cbpf.VLAN_TAG: 0,
    cbpf.VLAN_TAG_PRESENT: 0,
    cbpf.VLAN_TPID: 0,
}

_AT_TC: dict[int, Source] = ANYWHERE | {
    cbpf.PROTOCOL: Field(16, big_endian=True),
    cbpf.PKTTYPE: Field(4),
    cbpf.IFINDEX: Field(40),
    cbpf.MARK: Field(8),
    cbpf.QUEUE: Field(12),
    cbpf.RXHASH: Field(68),
    cbpf.VLAN_TAG: Field(24),
    cbpf.VLAN_TAG_PRESENT: Field(20),
    cbpf.VLAN_TPID: Field(28, big_endian=True),
}

XDP = Hook("xdp", _PROG_TYPE_XDP, _XDP_PASS, _XDP_DROP, 0, 4, None, _AT_XDP, expected_attach_type=_ATTACH_TYPE_XDP)

# For interfaces whose MTU needs frames in fragments, where every program in the chain is of this kind.
XDP_FRAGS = Hook(
    "xdp.frags",
    _PROG_TYPE_XDP,
    _XDP_PASS,
    _XDP_DROP,
    0,
    4,
    ebpf.XDP_LOAD_BYTES,
    _AT_XDP,
    expected_attach_type=_ATTACH_TYPE_XDP,
    program_flags=_F_XDP_HAS_FRAGS,
)

TC_IN = Hook("tc-in", _PROG_TYPE_SCHED_CLS, _TC_ACT_UNSPEC, _TC_ACT_SHOT, 76, 80, ebpf.SKB_LOAD_BYTES, _AT_TC, length=0)

# There the kernel has not yet marked a packet as outgoing, but it is.
TC_OUT = Hook(
    "tc-out",
    _PROG_TYPE_SCHED_CLS,
    _TC_ACT_UNSPEC,
    _TC_ACT_SHOT,
    76,
    80,
    ebpf.SKB_LOAD_BYTES,
    _AT_TC | {cbpf.PKTTYPE: _PACKET_OUTGOING},
    length=0,
)

HOOKS = {hook.name: hook for hook in (XDP, XDP_FRAGS, TC_IN, TC_OUT)}
