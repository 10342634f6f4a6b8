"""What this kernel and a driver can do with XDP, asked without attaching anything.

Enters: an interface, a loaded program, or a map. Leaves: the driver's XDP features, what the verifier and the
JIT made of a program, and the memory that a map takes.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from enum import IntFlag
from errno import ENODEV, ENOENT

from pyroute2.netlink import NLM_F_REQUEST, genlmsg
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import GenericNetlinkSocket

from xdp import libbpf
from xdp.maps import Map
from xdp.object import program_info

# include/uapi/linux/netdev.h
NETDEV_FAMILY = "netdev"
NETDEV_CMD_DEV_GET = 1

_ARRAY, _PER_CPU_ARRAY = 2, 6  # enum bpf_map_type; the other maps here are hash tables
# kernel/bpf/hashtab.c: struct htab_elem without key and value, struct bucket
_HASH_ELEMENT, _HASH_BUCKET = 48, 16
_POINTER = 8


class XdpFeatures(IntFlag):
    """enum netdev_xdp_act: what the driver can do natively, as it is set up at the moment."""

    BASIC = 1  # drop, pass, send back
    REDIRECT = 2
    NDO_XMIT = 4  # send what another interface redirects here


class _NetdevMessage(genlmsg):  # type: ignore[misc]
    """Documentation/netlink/specs/netdev.yaml, attribute set dev."""

    prefix = "NETDEV_A_DEV_"
    nla_map = (
        ("NETDEV_A_DEV_UNSPEC", "none"),
        ("NETDEV_A_DEV_IFINDEX", "uint32"),
        ("NETDEV_A_DEV_PAD", "none"),
        ("NETDEV_A_DEV_XDP_FEATURES", "uint64"),
    )


def xdp_features(ifindex: int) -> XdpFeatures | None:
    """The driver's own word; None where the kernel (before 6.3) has no such question, or the interface is gone."""
    request = _NetdevMessage()
    request["cmd"], request["version"] = NETDEV_CMD_DEV_GET, 1
    request["attrs"] = [("NETDEV_A_DEV_IFINDEX", ifindex)]
    with closing(GenericNetlinkSocket()) as netlink:
        try:
            netlink.bind(NETDEV_FAMILY, _NetdevMessage)
            (answer,) = netlink.nlm_request(request, msg_type=netlink.prid, msg_flags=NLM_F_REQUEST)
        except NetlinkError as error:
            if error.code in (ENOENT, ENODEV):
                return None
            raise
    return XdpFeatures(answer.get_attr("NETDEV_A_DEV_XDP_FEATURES") & sum(XdpFeatures))


@dataclass(frozen=True, slots=True)
class Verified:
    """What became of a program: the instructions that the verifier walked, and whether it runs as machine code."""

    instructions: int
    jited: bool


def verified(program_fd: int) -> Verified:
    info = program_info(program_fd)
    return Verified(info.verified_insns, info.jited_prog_len > 0)


def map_memory(bpf_map: Map, entries: int) -> int:
    """Bytes that a map of this kind takes with so many entries, as its fdinfo would tell: all are allocated at once."""
    info = bpf_map.info
    key, value = _in_words(info.key_size), _in_words(info.value_size)
    if info.type == _ARRAY:
        return entries * value
    if info.type == _PER_CPU_ARRAY:
        return int(entries * (value * libbpf.possible_cpus() + _POINTER))
    buckets = 1 << (entries - 1).bit_length()
    return entries * (_HASH_ELEMENT + key + value) + buckets * _HASH_BUCKET


def _in_words(size: int) -> int:
    return -(-size // 8) * 8
