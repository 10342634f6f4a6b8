"""Facts of a host that the checks of `xdp-lb doctor` read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dataplane:
    """The program as the kernel loaded it."""

    instructions: int
    jited: bool
    nat_ports: tuple[int, int]  # first and last that mode nat takes
    map_bytes: int  # what its maps take with the services that are stored


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something could not be had, and what mends it."""

    why: str
    fix: str


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Of one address family: how many backends there are, and how many neighbours the kernel keeps at most."""

    family: int
    backends: int
    limit: int


@dataclass(frozen=True, slots=True)
class Host:
    """What all interfaces share. `dataplane` is None where the capabilities to try are missing."""

    kernel: str
    cpus: int
    page_size: int
    missing_capabilities: tuple[str, ...]
    dataplane: Dataplane | Refusal | None
    loaded: bool  # programs and maps are in the kernel already
    has_bpffs: bool
    pins: str  # where they are, or will be
    services: int | Refusal
    modes: frozenset[str]
    families: frozenset[int]
    free_bytes: int
    memory_limit: str | None  # the file with the limit that leaves no more than free_bytes; None: the host's memory
    local_ports: tuple[int, int]
    neighbours: tuple[Neighbours, ...]
    loopback_addresses: tuple[str, ...]  # IPv4, besides 127.0.0.0/8


@dataclass(frozen=True, slots=True)
class Program:
    """The XDP program that an interface runs. `mode` is native, generic or offload. `lost`: ours by its name, but
    without pins."""

    mode: str
    program_id: int
    name: str
    ours: bool
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Peer:
    """A veth's other end; None where it is in another network namespace, out of sight."""

    name: str
    mtu: int
    tx_queues: int
    leaves_checksums_out: bool
    leaves_vlan_tags_out: bool


@dataclass(frozen=True, slots=True)
class Queues:
    rx: int
    most_rx: int
    combined: bool


@dataclass(frozen=True, slots=True)
class Interface:
    """One Ethernet interface. `native` and `transmits` are None where the kernel cannot tell."""

    name: str
    driver: str | None
    up: bool
    mtu: int
    native: bool | None
    transmits: bool | None  # frames that another interface redirects here
    program: Program | None = None
    peer: Peer | None = None
    queues: Queues | None = None
    offloads: frozenset[str] = frozenset()  # those that are on, by ethtool's names
    fixed_offloads: frozenset[str] = frozenset()
    forwarding: frozenset[int] = frozenset()  # the address families that it is on for
    rp_filter: int = 0
    arp_ignore: int = 0
    arp_announce: int = 0

    @property
    def is_veth(self) -> bool:
        return self.driver == "veth"
