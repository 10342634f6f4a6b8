"""Programs on interfaces: put on, replaced without a gap, taken off, and always read back.

Enters: an interface index and a loaded program (file descriptor and id). Leaves: what the interface
runs then. A program hangs on the interface itself, not on a bpf_link, so that it outlives the
process without a further pin.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from errno import EBUSY, EEXIST, ENODEV, EPERM
from typing import Any

from xdp.errors import AttachError, NoSuchInterface, Occupied
from xdp.netlink import IPRoute, NetlinkError, reason, route_socket, translate

AUTO, NATIVE, GENERIC, OFFLOAD = "auto", "native", "generic", "offload"

# include/uapi/linux/if_link.h
XDP_FLAGS_UPDATE_IF_NOEXIST = 1 << 0
XDP_FLAGS_SKB_MODE = 1 << 1
XDP_FLAGS_DRV_MODE = 1 << 2
XDP_FLAGS_HW_MODE = 1 << 3
XDP_FLAGS_REPLACE = 1 << 4

_MODE_FLAG = {NATIVE: XDP_FLAGS_DRV_MODE, GENERIC: XDP_FLAGS_SKB_MODE, OFFLOAD: XDP_FLAGS_HW_MODE}
_ID_ATTRIBUTE = {
    NATIVE: "IFLA_XDP_DRV_PROG_ID",
    GENERIC: "IFLA_XDP_SKB_PROG_ID",
    OFFLOAD: "IFLA_XDP_HW_PROG_ID",
}
_IP_LINK_WORD = {NATIVE: "xdp", GENERIC: "xdpgeneric", OFFLOAD: "xdpoffload"}

# What a retry in generic mode cannot mend: no interface, no permission, another program.
_FINAL = frozenset({ENODEV, EPERM, EBUSY, EEXIST})
_TAKEN = frozenset({EBUSY, EEXIST})
_NO_PROGRAM = -1


@dataclass(frozen=True, slots=True)
class Attached:
    """The XDP program that an interface runs.

    `mode` is native, generic or offload; `warning` says what the operator should know of it.
    """

    mode: str
    program_id: int
    warning: str | None = None


def attach(
    ifindex: int,
    program_fd: int,
    program_id: int,
    mode: str = AUTO,
    *,
    replace_fd: int | None = None,
    describe: Callable[[int], str] = "id {}".format,
) -> Attached:
    """Put a program on an interface, or in the place of `replace_fd`'s without a gap.

    `mode` is auto (native, else generic with a warning that says why), native or generic. A program
    that replaces another runs in the mode of the other. `describe` turns the id of someone else's
    program into words for the error. Doing it twice changes nothing. Raises NoSuchInterface,
    Occupied, NotPermitted, NotSupported, or AttachError with the kernel's words.
    """
    with route_socket() as ipr:
        link = _existing(ipr, ifindex)
        _refuse_foreign(link, program_id, replace_fd, describe)
        _refuse_mode_change(link, mode)
        try:
            why_generic = _put(ipr, link, program_fd, program_id, mode, replace_fd)
        except NetlinkError as error:
            if error.code in _TAKEN:
                _refuse_foreign(_existing(ipr, ifindex), program_id, None, describe)
            raise translate(error, f"{link.name}: cannot attach") from error
        now = _existing(ipr, ifindex)
    _refuse_foreign(now, program_id, None, describe)
    if now.running is None:
        raise AttachError(f"{now.name}: the program was detached by another process")
    return replace(now.running, warning=_join(why_generic, _checksum_warning(now)))


def attached(ifindex: int) -> Attached | None:
    """What the interface runs; None where it runs nothing or is gone."""
    with route_socket() as ipr:
        link = _read(ipr, ifindex)
    return link.running if link else None


def all_attached() -> dict[str, Attached]:
    """Interface name -> what it runs, for all that run something."""
    with route_socket() as ipr:
        links = [_link(message) for message in ipr.link("dump")]
    return {link.name: link.running for link in links if link.running}


def detach(ifindex: int, expected_fd: int | None = None) -> None:
    """Take the program off; with `expected_fd` only that one: another stays where it is.

    No error where there is nothing to take off, be it that the interface is gone.
    """
    with route_socket() as ipr:
        link = _read(ipr, ifindex)
        if link is None or link.running is None:
            return
        try:
            _set_program(ipr, ifindex, _NO_PROGRAM, _MODE_FLAG[link.running.mode], expected_fd)
        except NetlinkError as error:
            if error.code == ENODEV or (expected_fd is not None and error.code == EEXIST):
                return
            raise translate(error, f"{link.name}: cannot detach") from error


@dataclass(frozen=True, slots=True)
class _Link:
    """The part of RTM_NEWLINK that matters here.

    `peer` is the index of a veth's other end, None where that is in another namespace.
    """

    ifindex: int
    name: str
    kind: str | None
    peer: int | None
    running: Attached | None


def _read(ipr: IPRoute, ifindex: int) -> _Link | None:
    try:
        message = ipr.link("get", index=ifindex)[0]
    except NetlinkError as error:
        if error.code == ENODEV:
            return None
        raise translate(error, f"interface {ifindex}") from error
    return _link(message)


def _existing(ipr: IPRoute, ifindex: int) -> _Link:
    link = _read(ipr, ifindex)
    if link is None:
        raise NoSuchInterface(f"interface {ifindex}: no longer exists")
    return link


def _link(message: Any) -> _Link:
    info = message.get_attr("IFLA_LINKINFO")
    elsewhere = message.get_attr("IFLA_LINK_NETNSID") is not None
    return _Link(
        ifindex=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        kind=info.get_attr("IFLA_INFO_KIND") if info else None,
        peer=None if elsewhere else message.get_attr("IFLA_LINK"),
        running=_running(message.get_attr("IFLA_XDP")),
    )


def _running(xdp: Any) -> Attached | None:
    for mode, attribute in _ID_ATTRIBUTE.items():
        if xdp and (program_id := xdp.get_attr(attribute)):
            return Attached(mode, program_id)
    return None


def _refuse_foreign(link: _Link, program_id: int, replace_fd: int | None, describe: Callable[[int], str]) -> None:
    """With `replace_fd` the kernel itself compares, at the moment of the exchange."""
    running = link.running
    if running is None or running.program_id == program_id or replace_fd is not None:
        return
    raise Occupied(
        f"{link.name}: another XDP program is attached ({describe(running.program_id)}):"
        f" detach it first: ip link set dev {link.name} {_IP_LINK_WORD[running.mode]} off"
    )


def _refuse_mode_change(link: _Link, mode: str) -> None:
    if link.running is not None and mode not in (AUTO, link.running.mode):
        raise AttachError(f"{link.name}: runs in {link.running.mode} mode: detach it first to change to {mode}")


def _put(ipr: IPRoute, link: _Link, fd: int, program_id: int, mode: str, replace_fd: int | None) -> str | None:
    """Make the kernel run the program; why it is in generic mode, if nobody asked for that."""
    if link.running is None:
        return _put_first(ipr, link, fd, mode)
    if link.running.program_id != program_id:
        _set_program(ipr, link.ifindex, fd, _MODE_FLAG[link.running.mode], replace_fd)
    return None


def _put_first(ipr: IPRoute, link: _Link, fd: int, mode: str) -> str | None:
    flags = XDP_FLAGS_UPDATE_IF_NOEXIST | _MODE_FLAG[NATIVE if mode == AUTO else mode]
    try:
        _set_program(ipr, link.ifindex, fd, flags)
    except NetlinkError as error:
        if mode != AUTO or error.code in _FINAL:
            raise
        _set_program(ipr, link.ifindex, fd, XDP_FLAGS_UPDATE_IF_NOEXIST | XDP_FLAGS_SKB_MODE)
        return f"{link.name}: generic mode, several times slower than native: {reason(error)}"
    return None


def _set_program(ipr: IPRoute, ifindex: int, fd: int, flags: int, expected_fd: int | None = None) -> None:
    """RTM_SETLINK with IFLA_XDP; with `expected_fd` compare and exchange, EEXIST if it differs."""
    attributes = [("IFLA_XDP_FD", fd)]
    if expected_fd is not None:
        flags |= XDP_FLAGS_REPLACE
        attributes.append(("IFLA_XDP_EXPECTED_FD", expected_fd))
    # pyroute2 takes the plain form xdp={"fd": ...} too, and sends nothing for it.
    ipr.link("set", index=ifindex, xdp={"attrs": [*attributes, ("IFLA_XDP_FLAGS", flags)]})


def _checksum_warning(link: _Link) -> str | None:
    """A veth hands over frames whose checksums were left to a card: XDP cannot mend them."""
    if link.kind != "veth":
        return None
    if link.peer is None:
        return (
            f"{link.name}: is a veth: its peer must send complete checksums and accept frames sent by XDP:"
            " run ethtool -K DEV tx off gro on at the peer"
        )
    from xdp import ethtool  # whose imports take their time

    try:
        peer = socket.if_indextoname(link.peer)
    except OSError:  # it has just left the namespace
        return None
    if not ethtool.offloads(peer).leave_checksums_out:
        return None
    return f"{link.name}: packets from its peer {peer} lack checksums: ethtool -K {peer} tx off"


def _join(*warnings: str | None) -> str | None:
    return "; ".join(filter(None, warnings)) or None
