"""Refuses rules that would end the connection that a change was requested on.

Enters: the rules before and after a change. Leaves: nothing, or InvalidInput that names the rule. The rules of each
hook are test-run on packets of the connection, and on ARP or neighbour discovery with its next hop, without which it
ends too. A pass rule that expires spares nothing; a rate too low for a packet counts as a drop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from filters.programs.sets import Prefixes
from lb.errors import InvalidInput
from lb.firewall.attach_points import HookKey
from lb.firewall.kernel import KernelFilters
from lb.firewall.text import shortened
from lb.host.interfaces import NextHop, carriers, next_hop_to, own_mac
from lb.host.resolution import End, resolution_frames, resolution_name
from lb.host.ssh import Connection
from lb.model.rules import Action, At, Clock, Rule, Rules

# What a connection needs, in packets per second: to be typed in, and to know the MAC address of its next hop.
_TRAFFIC, _RESOLUTION = 10.0, 1.0


@dataclass(frozen=True, slots=True)
class _Probe:
    """A frame, and the lowest rate at which it has to get through. `what` it is, if not the connection itself."""

    frame: bytes
    least_per_s: float
    what: str = ""


def check_connection(
    kernel: KernelFilters,
    connection: Connection,
    before: Rules,
    after: Rules,
    now: Clock,
    hooks: Iterable[HookKey],
    sets: Mapping[int, Prefixes],
) -> None:
    """`sets`: slot -> prefixes that the set of a rule is about to have. Raises InvalidInput where a packet would be
    dropped that is not dropped now."""
    names, next_hop = carriers(connection.server, connection.client), next_hop_to(connection.client)
    addresses = [connection.server, connection.client, *([next_hop.address] if next_hop else [])]
    covering = {slot: prefixes.covering(addresses) for slot, prefixes in sets.items()}
    for name, at in hooks:
        if names and name not in names:
            continue
        probes = list(_probes(connection, next_hop, name, at))
        was = before.in_time(now).hook(name, at) if kernel.in_force([(name, at)]) else ()
        for old, new, when in _now_and_later(was, after.hook(name, at)):
            culprits = _dropped(kernel, new, at, probes, covering)
            dropped_already = _dropped(kernel, old, at, probes, {}) if any(culprits) else culprits
            for probe, culprit, already in zip(probes, culprits, dropped_already, strict=True):
                if culprit and not already:
                    words = f"rule {_number(culprit, before, after)} ({_short(culprit)}){when}"
                    raise InvalidInput(f"{name}: {words} {connection.refusal(probe.what)}")


def _probes(connection: Connection, next_hop: NextHop | None, name: str, at: At) -> Iterator[_Probe]:
    to_server, own = at is not At.TC_OUT, own_mac(name)
    peer = next_hop.mac if next_hop else None
    segments = connection.frames(to_server=to_server, own_mac=own, peer_mac=peer)
    yield from (_Probe(frame, _TRAFFIC) for frame in segments)
    if next_hop is None:
        return
    ours, theirs = End(connection.server, own), End(next_hop.address, next_hop.mac)
    if ours.address.version != theirs.address.version:
        return
    what = f"{resolution_name(theirs.address)} with {theirs.address} and thereby "
    for frame in resolution_frames(*((theirs, ours) if to_server else (ours, theirs))):
        yield _Probe(frame, _RESOLUTION, what)


def _now_and_later(
    before: Sequence[Rule], after: Sequence[Rule]
) -> Iterator[tuple[Sequence[Rule], Sequence[Rule], str]]:
    """The rules as they are, then without the pass rules that expire."""
    yield before, after, ""
    if len(lasting := _lasting(after)) < len(after):
        yield _lasting(before), lasting, ", once the pass rules with a deadline have expired,"


def _lasting(rules: Sequence[Rule]) -> list[Rule]:
    return [rule for rule in rules if not (rule.deadline and rule.action is Action.PASS)]


def _dropped(
    kernel: KernelFilters, rules: Sequence[Rule], at: At, probes: Sequence[_Probe], sets: Mapping[int, Prefixes]
) -> list[Rule | None]:
    """Of each probe, the rule that drops it."""
    found: dict[_Probe, Rule | None] = {}
    own = {rule.slot: rule for rule in rules}
    for least_per_s in dict.fromkeys(probe.least_per_s for probe in probes):
        with kernel.tester(_with_rates_judged(rules, least_per_s), at, sets) as tester:
            for probe in probes:
                if probe.least_per_s == least_per_s:
                    culprit = tester.dropped_by(probe.frame)
                    found[probe] = own[culprit.slot] if culprit else None
    return [found[probe] for probe in probes]


def _with_rates_judged(rules: Sequence[Rule], least_per_s: float) -> list[Rule]:
    return [
        replace(rule, action=Action.DROP) if rule.rate and rule.rate.per_second < least_per_s else rule
        for rule in rules
    ]


def _number(rule: Rule, before: Rules, after: Rules) -> int:
    """As the list has it that the operator sees; a new rule's is the one that it would get."""
    return before.number(rule) if rule in before.all else after.number(rule)


def _short(rule: Rule) -> str:
    words = " ".join(filter(None, (str(rule.action), str(rule.rate or ""), shortened(rule.expression))))
    return f"{words} --set {rule.set.path}" if rule.set else words
