"""Programs on an interface for as long as somebody holds them there: bpf_link, which ends with its file descriptor.

Enters: an interface index and a loaded program. Leaves: a Link. A process that is killed leaves nothing behind, other
than with xdp.attach and xdp.tc. Programs at tc run one after the other (tcx, Linux 6.6), XDP has room for one; who
wants to see what comes to that one, or leaves it, hangs on the program itself (xdp.tracing).
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from errno import EBUSY, EEXIST, EINVAL, ENODEV, EOPNOTSUPP
from typing import Self

from xdp import libbpf
from xdp.errors import AttachError, NoSuchInterface, NotSupported, Occupied, XdpError

# enum bpf_attach_type, <linux/bpf.h>
_XDP, _TCX_INGRESS, _TCX_EGRESS = 37, 46, 47
TRACE_ENTRY, TRACE_EXIT = 24, 25
# <linux/if_link.h>; not from xdp.attach, which brings all of netlink along
_XDP_FLAGS_SKB_MODE, _XDP_FLAGS_DRV_MODE = 1 << 1, 1 << 2

_ERRORS: dict[int, type[XdpError]] = {
    EBUSY: Occupied,
    EEXIST: Occupied,
    ENODEV: NoSuchInterface,
    EINVAL: NotSupported,
    EOPNOTSUPP: NotSupported,
}
_WORDS = {
    EBUSY: "another XDP program is attached",
    EEXIST: "this program is already attached",
}


@dataclass(frozen=True, slots=True)
class Link:
    fd: int

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The program comes off. A packet may be in it still."""
        os.close(self.fd)


def hold_at_xdp(ifindex: int, program_fd: int, *, generic: bool = False) -> Link:
    """Native unless `generic`. Raises NoSuchInterface, Occupied, NotSupported or AttachError."""
    return _create(ifindex, program_fd, _XDP, _XDP_FLAGS_SKB_MODE if generic else _XDP_FLAGS_DRV_MODE)


def hold_at_tc(ifindex: int, program_fd: int, *, egress: bool) -> Link:
    """Behind the programs that are there. Raises as hold_at_xdp(): NotSupported before Linux 6.6."""
    return _create(ifindex, program_fd, _TCX_EGRESS if egress else _TCX_INGRESS, 0)


def hold_at_program(program_fd: int, attach_type: int) -> Link:
    """A tracing program on the one that it was loaded for: TRACE_ENTRY or TRACE_EXIT. Raises AttachError."""
    options = libbpf.LinkCreateOpts(sz=ctypes.sizeof(libbpf.LinkCreateOpts))
    try:
        return Link(libbpf.link_create(program_fd, 0, attach_type, ctypes.byref(options)))
    except OSError as error:
        raise AttachError(f"cannot trace the XDP program: {error.strerror}") from error


def _create(ifindex: int, program_fd: int, attach_type: int, flags: int) -> Link:
    options = libbpf.LinkCreateOpts(sz=ctypes.sizeof(libbpf.LinkCreateOpts), flags=flags)
    try:
        return Link(libbpf.link_create(program_fd, ifindex, attach_type, ctypes.byref(options)))
    except OSError as error:
        kind = _ERRORS.get(error.errno or 0, AttachError)
        words = _WORDS.get(error.errno or 0, error.strerror)
        raise kind(f"interface {ifindex}: cannot attach: {words}") from error
