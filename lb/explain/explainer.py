"""What `xdp-lb explain` tells of a packet, found by sending it through the program that is loaded.

Enters: the paths of this network namespace; packets. Leaves: Explanations. No lock is taken: the pins are enough, and
what a run adds to the tables is taken out again. Counters count it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from errno import EINVAL
from functools import partial

from filters.programs.sets import Prefixes
from lb.dataplane.errors import translated
from lb.dataplane.programs import PROGRAM, Programs
from lb.errors import DataplaneError, InvalidInput, part
from lb.explain.packet import Flow, Packet, check_size, make_frame, read
from lb.explain.probe import Probe, Run, probing
from lb.explain.reasons import Choice, Explanation, Outcome, Stage, choose, disagreement, members_reached
from lb.explain.tables import KernelTables
from lb.firewall.attach_points import NAME as FILTER
from lb.firewall.firewall import clock
from lb.firewall.kernel import KernelFilters
from lb.firewall.text import action_words, match_words
from lb.model.rules import Action, At, Rule
from lb.model.vip import Address
from lb.paths import Paths
from lb.stages.lifecycle import Records
from lb.stages.source import PROGRAM as USERS
from lb.store.store import Store
from xdp import attach as xdp_attach
from xdp.errors import LoadError
from xdp.netlink import NetlinkError, route_socket
from xdp.object import LB_OBJECT, BpfObject, program_name
from xdp.pins import Pins
from xdp.stages import Stages

MADE_UP_MAC = bytes.fromhex("020000000001")
NO_MAC = bytes(6)


@contextmanager
def open_explainer(paths: Paths) -> Iterator[Explainer]:
    """Raises DataplaneError where nothing is loaded, or what is loaded is of another version."""
    with translated(), ExitStack() as resources:
        generation = Pins(paths.run_dir, paths.netns).current()
        if generation is None:
            raise DataplaneError("no program loaded: run xdp-lb attach IFACE")
        obj = resources.enter_context(BpfObject.open(LB_OBJECT))
        try:
            obj.adopt(str(generation))
        except LoadError as error:
            raise DataplaneError(f"the loaded programs are of another version of xdp-lb ({error})") from error
        yield Explainer(paths, obj, resources)


class Explainer:
    """Asks the program in force. Methods raise DataplaneError and InvalidInput."""

    def __init__(self, paths: Paths, obj: BpfObject, resources: ExitStack) -> None:
        self._paths, self._object, self._resources = paths, obj, resources
        self._tables, self._stages = KernelTables(obj), Stages(obj)
        self._occupied = self._stages.occupied()
        self._probes: dict[int, Probe] = {}
        self._interfaces = _attached(obj)
        if not self._interfaces:
            raise DataplaneError("not attached to any interface: run xdp-lb attach IFACE")

    def flow(self, flow: Flow, tcp_flags: int = 0, interface: str | None = None) -> Explanation:
        """A packet of this flow, as it would come in."""
        packet = read(make_frame(flow, tcp_flags, NO_MAC, NO_MAC))
        ingress = self._ingress(packet, interface)
        frame = make_frame(flow, tcp_flags, ingress.client_mac, ingress.own_mac)
        notes = (
            () if ingress.client_mac != MADE_UP_MAC else ("the client's MAC address is unknown, a placeholder is used",)
        )
        return self._explain(frame, ingress.interface, notes)

    def frame(self, frame: bytes, interface: str | None = None, notes: tuple[str, ...] = ()) -> Explanation:
        """An Ethernet frame, as it is."""
        ingress = self._ingress(read(check_size(frame)), interface)
        return self._explain(frame, ingress.interface, notes)

    # The ingress

    def _ingress(self, packet: Packet | None, interface: str | None) -> Ingress:
        """That of the packets before it, where the flow is translated already; else the way to its sender, back."""
        if interface and interface not in self._interfaces:
            attached = ", ".join(self._interfaces)
            with part("interface"):
                raise InvalidInput(f"interface {interface}: not attached: xdp-lb is attached to {attached}")
        reply = self._tables.way_to_client(packet, choose(packet, self._tables)) if packet else None
        ifindex, mac = (reply.ifindex, reply.client_mac) if reply else _route_to(packet.flow.source if packet else None)
        name = interface or self._name_of(ifindex)
        own_mac = reply.own_mac if reply else _own_mac(self._interfaces[name])
        return Ingress(name, (mac if ifindex == self._interfaces[name] else None) or MADE_UP_MAC, own_mac)

    def _name_of(self, ifindex: int | None) -> str:
        """Of an interface that is attached; else the first one's."""
        names = (name for name, number in self._interfaces.items() if number == ifindex)
        return next(names, next(iter(self._interfaces)))

    # The run

    def _explain(self, frame: bytes, interface: str, notes: tuple[str, ...]) -> Explanation:
        packet = read(frame)
        choice = choose(packet, self._tables) if packet else Choice()
        run = self._run(frame, interface, packet, choice)
        outcome = self._outcome(run, frame, interface)
        explanation = self._checked(packet, choice, outcome, frame, interface)
        if explanation.disagreement and packet:  # somebody may have changed the tables meanwhile
            again = self._checked(packet, choose(packet, self._tables), outcome, frame, interface)
            explanation = explanation if again.disagreement else again
        return replace(explanation, notes=notes)

    def _run(self, frame: bytes, interface: str, packet: Packet | None, choice: Choice) -> Run:
        probe = self._probe(interface)
        with self._tables.leaving_no_trace(packet, choice) if packet else nullcontext():
            try:
                run = probe.run(frame)
            except OSError as error:
                why = "the kernel does not accept test packets for it" if error.errno == EINVAL else str(error.strerror)
                raise DataplaneError(f"interface {interface}: {why}: check that it is up") from error
        if run.reason is None and not self._occupied:
            raise DataplaneError("another program was attached behind the balancer at the same time: try again")
        return run

    def _probe(self, interface: str) -> Probe:
        ifindex = self._interfaces[interface]
        if ifindex not in self._probes:
            self._probes[ifindex] = self._resources.enter_context(probing(self._object, ifindex))
        return self._probes[ifindex]

    def _outcome(self, run: Run, frame: bytes, interface: str) -> Outcome:
        egress = (run.egress, _name(run.egress)) if run.egress else None
        return Outcome(run.action, run.reason, run.frame, egress, self._ended_by(run, frame, interface))

    def _checked(
        self, packet: Packet | None, choice: Choice, outcome: Outcome, frame: bytes, interface: str
    ) -> Explanation:
        reached = []
        if packet and choice.service and outcome.reason == "forwarded":
            reached = members_reached(outcome, packet, choice.service, self._tables)
        member = choice.member if choice.member in reached or not reached else reached[0]
        return Explanation(
            interface,
            frame,
            packet,
            outcome,
            choice,
            member,
            slot_members=self._slot_members(choice),
            hop_interface=_name(member.ifindex) if member and member.is_resolved else None,
            disagreement=disagreement(choice, outcome, reached),
        )

    def _slot_members(self, choice: Choice) -> tuple[str | None, str | None]:
        if not choice.slot or not choice.service:
            return None, None
        found = (self._tables.member(choice.service, n) for n in (choice.slot.current, choice.slot.previous))
        current, previous = (str(member) if member else None for member in found)
        return current, previous

    # Stages

    def _ended_by(self, run: Run, frame: bytes, interface: str) -> tuple[Stage, ...]:
        """The programs that can have ended the packet's way; one, as a rule."""
        if run.reason is not None:
            changed = run.balancer_action != run.action
            return tuple(self._stage(place) for place in self._occupied if changed and place in self._stages.exits)
        if self._stages.filter in self._occupied and (rule := rule_that_stopped(self._paths, interface, frame)):
            return (self._stage(self._stages.filter, rule),)
        return tuple(self._stage(place) for place in self._occupied)

    def _stage(self, place: int, rule: str | None = None) -> Stage:
        names = {self._stages.filter: "filter"}
        where = names.get(place, "in front" if place in self._stages.users else "behind")
        return Stage(where, self._occupied[place], self._program_name(place), rule)

    def _program_name(self, place: int) -> str:
        """Our own are known without the kernel, which takes CAP_SYS_ADMIN to tell."""
        number = self._occupied[place]
        if place == self._stages.filter:
            return FILTER
        is_of_user = any(record.program_id == number for record in Records(self._paths).all())
        return USERS if is_of_user else program_name(number)


@dataclass(frozen=True, slots=True)
class Ingress:
    """An interface, and the Ethernet addresses of what comes in there."""

    interface: str
    client_mac: bytes
    own_mac: bytes


def _attached(obj: BpfObject) -> dict[str, int]:
    """The interfaces that run the object's program: name -> index."""
    number = obj.program(PROGRAM).id
    names = [name for name, running in xdp_attach.all_attached().items() if running.program_id == number]
    return {name: socket.if_nametoindex(name) for name in names}


def _route_to(address: Address | None) -> tuple[int | None, bytes | None]:
    """The interface towards an address, and the MAC address that its packets come from, as far as the kernel knows."""
    if address is None:
        return None, None
    with route_socket() as ipr:
        try:
            (route,) = ipr.route("get", dst=str(address))
            ifindex = route.get_attr("RTA_OIF")
            via = route.get_attr("RTA_GATEWAY") or str(address)
        except NetlinkError:
            return None, None
        with suppress(NetlinkError):  # nobody has asked for it yet
            (neighbour,) = ipr.neigh("get", dst=via, ifindex=ifindex)
            if mac := neighbour.get_attr("NDA_LLADDR"):
                return ifindex, _mac(mac)
    return ifindex, None


def _own_mac(ifindex: int) -> bytes:
    with route_socket() as ipr:
        (link,) = ipr.link("get", index=ifindex)
    return _mac(link.get_attr("IFLA_ADDRESS"))


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _name(ifindex: int) -> str:
    with suppress(OSError):
        return socket.if_indextoname(ifindex)
    return str(ifindex)


# The filter


def rule_that_stopped(paths: Paths, interface: str, frame: bytes) -> str | None:
    """Which rule drops this frame: run by itself, since other packets move the counters too. None: none of them."""
    with ExitStack() as resources:
        store = resources.enter_context(Store.open(paths.store, False))
        programs = resources.enter_context(closing(Programs.open(paths)))
        filters = resources.enter_context(KernelFilters.open(paths, programs, partial(_stored_set, store)))
        rules = store.rules().in_time(clock())
        hook = rules.hook(interface, At.XDP)
        tester = resources.enter_context(filters.tester(hook, At.XDP))
        rule = tester.dropped_by(frame) or _limiting(hook, tester.matched())
        return f"rule {rules.number(rule)}: {action_words(rule)} {match_words(rule)}" if rule else None


def _limiting(rules: Sequence[Rule], matched: Mapping[int, int]) -> Rule | None:
    """The first limit that the frame came under."""
    return next((rule for rule in rules if rule.action is Action.LIMIT and matched[rule.slot]), None)


def _stored_set(store: Store, slot: int) -> Prefixes:
    return Prefixes.unpacked(*store.rule_set(slot))
