"""The kernel side of decapsulation: prefixes and constants in maps, programs on interfaces.

Enters: a DecapConfig. Leaves: the XDP program that decapsulates, the tc ingress program that forwards packets to the
other member, and their counters. The configuration is fixed at load: a new one is loaded next to the old, on the same
counters, and replaces it atomically.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from typing import Any

from lb.dataplane.errors import translated
from lb.dataplane.members import address_words
from lb.decap.values import DecapConfig, DecapStatistics, Prefix, TunnelCounters
from lb.errors import DataplaneError
from lb.model.forwarding import Attachment
from lb.model.state import Interface
from lb.model.vip import Address
from lb.paths import Paths
from xdp import attach as xdp_attach
from xdp import tc
from xdp.errors import LoadError
from xdp.object import DECAP_OBJECT, BpfObject, Program, pinned_program, program_name
from xdp.pins import Pins

PROGRAM, SENDER = "xdp_decap", "decap_send"
COUNTERS = ("reasons", "tunnels")
LOCALLY_ADMINISTERED, GROUP = 0x02, 0x01  # bits of a MAC address's first byte


class KernelDecap:
    """Every method raises DataplaneError."""

    def __init__(self, pins: Pins) -> None:
        self._pins = pins

    @classmethod
    def open(cls, paths: Paths) -> KernelDecap:
        return cls(Pins(paths.run_dir / "decap", paths.netns))

    def attach(
        self, interfaces: Sequence[Interface], config: DecapConfig, own: Mapping[int, Address]
    ) -> list[Attachment]:
        """The configuration in force on these interfaces and on all that are attached, or an error and no change.

        `own`: IP version -> an address of this host, where it has one.
        """
        with translated(), BpfObject.open(DECAP_OBJECT) as obj, ExitStack() as undo:
            self._load(obj, config, own)
            generation = self._pins.prepare()
            undo.callback(self._discard, generation)
            obj.pin(str(generation))
            done = [self._put_on(each, obj, undo) for each in self._all(interfaces)]
            self._pins.put_in_force(generation)
            undo.pop_all()
            for older in self._pins.others():
                self._pins.discard(older)
        return done

    def _discard(self, generation: Path) -> None:
        """Of an attach that failed; with the first one, the bpffs goes too."""
        self._pins.discard(generation)
        if not self._generations():
            self._pins.remove()

    def _all(self, interfaces: Sequence[Interface]) -> list[Interface]:
        """Those not attached yet come first: they are the ones that may refuse."""
        attached = self._attached()
        wanted = {each.name: each for each in interfaces} | {
            name: Interface(name) for name in attached if name not in {each.name for each in interfaces}
        }
        return sorted(wanted.values(), key=lambda each: each.name in attached)

    def _load(self, obj: BpfObject, config: DecapConfig, own: Mapping[int, Address]) -> None:
        """On the counters that are in force, and with the mark: the one program is replaced before the other."""
        with BpfObject.open(DECAP_OBJECT) as old:
            if not self._adopt(old):
                load(obj, config, own, _new_mark())
                return
            for name in COUNTERS:
                obj.reuse(name, old.map(name).fd)
            load(obj, config, own, bytes(_config(old).mark))

    def _adopt(self, obj: BpfObject) -> bool:
        """False if nothing is attached, or programs of another version: these are replaced anyway."""
        current = self._pins.current()
        if current is None:
            return False
        try:
            obj.adopt(str(current))
        except LoadError:
            return False
        return True

    def _put_on(self, interface: Interface, obj: BpfObject, undo: ExitStack) -> Attachment:
        """The sender before the program that gives it packets."""
        ifindex = _ifindex(interface.name)
        before = self._running(ifindex)
        self._put_sender(ifindex, obj.program(SENDER), undo)
        program = obj.program(PROGRAM)
        done = xdp_attach.attach(
            ifindex,
            program.fd,
            program.id,
            interface.xdp_mode.value,
            replace_fd=before.fd if before else None,
            describe=lambda number: f"id {number}, name {program_name(number)}",
        )
        undo.callback(_put_back, ifindex, program, before)
        return Attachment(interface.name, done.mode, done.program_id, done.warning)

    def _put_sender(self, ifindex: int, sender: Program, undo: ExitStack) -> None:
        """Of a sender that was there before, the one in its place does the same: it is left where it is."""
        if tc.is_attached(ifindex):
            tc.attach(ifindex, sender.fd, SENDER)
        else:
            undo.callback(tc.detach, ifindex)
            tc.attach(ifindex, sender.fd, SENDER)

    # What is in force

    def attachments(self) -> dict[str, Attachment]:
        with translated():
            return self._attached()

    def _attached(self) -> dict[str, Attachment]:
        ours = self._our_programs()
        return {
            name: Attachment(name, running.mode, running.program_id)
            for name, running in xdp_attach.all_attached().items()
            if running.program_id in ours
        }

    def _running(self, ifindex: int) -> Program | None:
        """Ours, if the interface runs one."""
        running = xdp_attach.attached(ifindex)
        return self._our_programs().get(running.program_id) if running else None

    def _generations(self) -> list[Path]:
        current = self._pins.current()
        return [*([current] if current else []), *self._pins.others()]

    def _our_programs(self) -> dict[int, Program]:
        return {program.id: program for program in self._pinned()}

    def _pinned(self) -> Iterator[Program]:
        """A missing pin means that the process was killed before it attached the program."""
        for generation in self._generations():
            with suppress(LoadError):
                yield pinned_program(str(generation), PROGRAM)

    def read(self) -> tuple[DecapConfig | None, DecapStatistics | None]:
        """What is in force, and what it has counted; None for both where nothing is."""
        with translated(), BpfObject.open(DECAP_OBJECT) as obj:
            current = self._pins.current()
            if current is None:
                return None, None
            try:
                obj.adopt(str(current))
            except LoadError as error:
                raise DataplaneError(
                    f"the loaded programs are of another version of xdp-lb ({error}): run xdp-lb decap attach"
                    " to replace them"
                ) from error
            return _read_config(obj), _read_statistics(obj)

    def detach(self, name: str) -> None:
        with translated(), suppress(OSError):  # the interface is gone
            ifindex = socket.if_nametoindex(name)
            if running := self._running(ifindex):
                xdp_attach.detach(ifindex, running.fd)
                tc.detach(ifindex)

    def unload(self) -> None:
        with translated():
            self._pins.remove()


def _ifindex(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        raise DataplaneError(f"interface {name}: does not exist") from None


def _put_back(ifindex: int, program: Program, before: Program | None) -> None:
    if before:
        xdp_attach.attach(ifindex, before.fd, before.id, replace_fd=program.fd)
    else:
        xdp_attach.detach(ifindex, program.fd)


def _new_mark() -> bytes:
    """A MAC address that no one can guess and no card has."""
    first, *rest = secrets.token_bytes(6)
    return bytes([(first | LOCALLY_ADMINISTERED) & ~GROUP, *rest])


# The configuration in the maps


def load(obj: BpfObject, config: DecapConfig, own: Mapping[int, Address], mark: bytes) -> None:
    """Load the programs, ready to be attached. `mark`: the MAC address that both know. Raises XdpError."""
    tries = _tries(config)
    obj.configure("config", **_constants(config, own, mark), **_only_prefixes(obj, tries))
    for name, prefixes in tries.items():
        obj.resize(name, max(1, len(prefixes)))
    obj.load()
    for name, prefixes in tries.items():
        for prefix in prefixes:
            obj.map(name)[_key(obj, name, prefix)] = 1


def _config(obj: BpfObject) -> Any:
    return obj.map(".rodata")[0].config


def _constants(config: DecapConfig, own: Mapping[int, Address], mark: bytes) -> dict[str, Any]:
    return {
        "mark": tuple(mark),
        "own_address4": int(own.get(4, IPv4Address(0))),
        "own_address6": tuple(address_words(own.get(6, IPv6Address(0)))),
        "gue_port": config.gue_port,
        "check_outer_source": bool(config.sources),
        "several_destinations": config.has_several_destinations,
    }


def _only_prefixes(obj: BpfObject, tries: Mapping[str, list[Prefix]]) -> dict[str, Any]:
    """The fields for tries that hold one prefix: the programs compare with it, and look nothing up."""
    return {f"{name[:-2]}{name[-1]}": _only(obj, prefixes[0]) for name, prefixes in tries.items() if len(prefixes) == 1}


def _only(obj: BpfObject, prefix: Prefix) -> Any:
    only = obj.types.struct(f"only{prefix.version}")()
    if prefix.version == 4:
        only.network, only.mask = int(prefix.network_address), int(prefix.netmask)
    else:
        only.network[:], only.mask[:] = address_words(prefix.network_address), address_words(prefix.netmask)
    return only


def _tries(config: DecapConfig) -> dict[str, list[Prefix]]:
    return {
        f"{name}{version}": [prefix for prefix in prefixes if prefix.version == version]
        for name, prefixes in (("destinations", config.destinations), ("sources", config.sources))
        for version in (4, 6)
    }


def _key(obj: BpfObject, name: str, prefix: Prefix) -> Any:
    key = obj.map(name).key_type(length=prefix.prefixlen)
    if prefix.version == 4:
        key.address = int(prefix.network_address)
    else:
        key.address[:] = address_words(prefix.network_address)
    return key


def _read_prefixes(obj: BpfObject, name: str) -> Iterable[Prefix]:
    for version in (4, 6):
        for key, _ in obj.map(f"{name}{version}").items():
            address = IPv4Address(key.address) if version == 4 else IPv6Address(bytes(key.address))
            yield ip_network((address, key.length))


def _read_config(obj: BpfObject) -> DecapConfig:
    destinations, sources = (tuple(_read_prefixes(obj, name)) for name in ("destinations", "sources"))
    return DecapConfig(destinations, sources, _config(obj).gue_port)


def _read_statistics(obj: BpfObject) -> DecapStatistics:
    tunnels, reasons = (obj.map(name).totals() for name in ("tunnels", "reasons"))
    kinds, names = obj.types.enum("tunnel_kind"), obj.types.enum("decap_reason")
    return DecapStatistics(
        {
            kind.lower(): TunnelCounters(tunnels[number].packets, tunnels[number].bytes)
            for kind, number in kinds.items()
            if not kind.endswith("_COUNT")
        },
        {
            name.lower(): reasons[number]
            for name, number in names.items()
            if name.startswith(("SENT_", "PASS_", "DROP_", "NOTED_"))
        },
    )
