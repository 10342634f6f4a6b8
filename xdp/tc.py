"""Programs at an interface's tc ingress and egress: put on, replaced without a gap, taken off.

Enters: an interface index and a loaded program's file descriptor. Leaves: a direct-action filter on
clsact, under a priority and a handle of our own, so that filters of others stay beside it. It
outlives the process, on every kernel that this package runs on (tcx came with 6.6).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EEXIST, EINVAL, ENODEV, ENOENT
from typing import Any, Self

from xdp.netlink import IPRoute, NetlinkError, route_socket, translate

# include/uapi/linux/pkt_sched.h, if_ether.h
_INGRESS, _EGRESS = 0xFFFF_FFF2, 0xFFFF_FFF3
_ETH_P_ALL = 0x0003


@dataclass(frozen=True, slots=True)
class Place:
    """Where a program of ours stays: programs run by priority, the lowest first."""

    egress: bool
    priority: int

    @property
    def words(self) -> dict[str, Any]:
        parent = _EGRESS if self.egress else _INGRESS
        return {"parent": parent, "prio": self.priority, "handle": self.priority, "protocol": _ETH_P_ALL}


# Between them stay the programs of hold().
FIRST_IN = Place(egress=False, priority=0x4C)
_HELD = 0x4D
LAST_IN, LAST_OUT = Place(egress=False, priority=0x4E), Place(egress=True, priority=0x4E)


def attach(ifindex: int, program_fd: int, name: str, place: Place = FIRST_IN) -> None:
    """Put the program there, or in the place of an earlier one of ours. Raises XdpError."""
    with route_socket() as ipr, _refusals(f"interface {ifindex}: cannot attach {name}"):
        _add_clsact(ipr, ifindex)
        ipr.tc("replace-filter", "bpf", ifindex, fd=program_fd, name=name, direct_action=True, **place.words)


def detach(ifindex: int, place: Place = FIRST_IN) -> None:
    """Take our program off, and clsact too where nobody else uses it.

    No error where there is nothing to take off, be it that the interface is gone.
    """
    _remove(ifindex, place.words)


def _remove(ifindex: int, place: dict[str, Any]) -> None:
    with route_socket() as ipr, _refusals(f"interface {ifindex}: cannot detach", but=(ENODEV, EINVAL, ENOENT)):
        ipr.tc("del-filter", "bpf", ifindex, **place)
        if not _filters(ipr, ifindex):
            ipr.tc("del", "clsact", ifindex)


@dataclass(frozen=True, slots=True)
class Held:
    """A program beside all others at tc ingress or egress, until close(); other than an xdp.link it outlives a kill."""

    ifindex: int
    place: dict[str, Any]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        _remove(self.ifindex, self.place)


def hold(ifindex: int, program_fd: int, program_id: int, name: str, *, egress: bool) -> Held:
    """For kernels without tcx. Behind attach()'s program; each by the handle that is its own id. Raises XdpError."""
    place = Place(egress, _HELD).words | {"handle": program_id}
    with route_socket() as ipr, _refusals(f"interface {ifindex}: cannot attach {name}"):
        _add_clsact(ipr, ifindex)
        ipr.tc("add-filter", "bpf", ifindex, fd=program_fd, name=name, direct_action=True, **place)
    return Held(ifindex, place)


def release_left(name: str) -> None:
    """Take off what processes that were killed have left of hold() under this name, on whatever interface."""
    with route_socket() as ipr, _refusals(f"stale programs {name}"):
        indices = {message["index"] for message in ipr.get_qdiscs() if message.get_attr("TCA_KIND") == "clsact"}
        left = [(index, place) for index in indices for place in _places_of(ipr, index, name)]
    for index, place in left:
        _remove(index, place)


def _places_of(ipr: IPRoute, ifindex: int, name: str) -> Iterator[dict[str, Any]]:
    for egress in (False, True):
        words = Place(egress, _HELD).words
        for message in ipr.get_filters(index=ifindex, parent=words["parent"]):
            options = message.get_attr("TCA_OPTIONS")
            is_held = message["info"] >> 16 == _HELD and options
            if is_held and options.get_attr("TCA_BPF_NAME") == name:
                yield words | {"handle": message["handle"]}


def is_attached(ifindex: int, place: Place = FIRST_IN) -> bool:
    """Also False where the interface is gone."""
    words = place.words
    with route_socket() as ipr, _refusals(f"interface {ifindex}", but=(ENODEV, EINVAL)):
        return any(
            message["handle"] == words["handle"] for message in ipr.get_filters(index=ifindex, parent=words["parent"])
        )
    return False


@contextmanager
def _refusals(subject: str, but: Collection[int] = ()) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        if error.code not in but:
            raise translate(error, subject) from error


def _add_clsact(ipr: IPRoute, ifindex: int) -> None:
    try:
        ipr.tc("add", "clsact", ifindex)
    except NetlinkError as error:
        if error.code != EEXIST:
            raise


def _filters(ipr: IPRoute, ifindex: int) -> list[Any]:
    return [
        message
        for parent in (_INGRESS, _EGRESS)
        for message in ipr.get_filters(index=ifindex, parent=parent)
        if message["handle"]
    ]
