"""What the operator asks of a rule -> a rule, checked and compiled."""

from __future__ import annotations

from pathlib import Path

from filters.compiler import cbpf
from filters.compiler.expr import compile_expression
from filters.errors import FilterError
from filters.interfaces import Interface, netmask
from filters.programs.sets import Prefixes, parse_prefixes, read_prefixes
from filters.selftest.selftest import check
from lb.dataplane.errors import translated
from lb.errors import InvalidInput, part
from lb.firewall.kernel import HOOKS
from lb.host.interfaces import check_interface, ifindex_of
from lb.model.rule_report import ApplyOptions, RuleSpec
from lb.model.rules import Clock, Deadline, Rule, SetSource

LONGEST_EXPRESSION = 1 << 14


def new_rule(
    wish: RuleSpec, slot: int, now: Clock, how: ApplyOptions, prefixes: Prefixes | None = None
) -> tuple[Rule, Prefixes | None]:
    """`prefixes`: those of its text, where they are known already."""
    check_interface(wish.interface)
    rule, found = build_rule(wish, slot, now, prefixes)
    if how.selftest:
        with translated(), part("expression"):
            check(cbpf.decode(rule.instructions), HOOKS[rule.at])
    return rule, found


def build_rule(wish: RuleSpec, slot: int, now: Clock, prefixes: Prefixes | None = None) -> tuple[Rule, Prefixes | None]:
    with part("expression"):
        instructions = cbpf.encode(_compile(wish))
    source = None
    if wish.set_path is not None:
        path, prefixes = _set(wish.set_path, wish.set_list, prefixes)
        source = SetSource(path, wish.set_side, len(prefixes))
    deadline = _deadline_of(wish, now)
    rule = Rule(slot, wish.interface, wish.at, wish.action, wish.expression, instructions, wish.rate, source, deadline)
    return rule, prefixes


def _set(path: str, text: str | None, prefixes: Prefixes | None) -> tuple[str, Prefixes]:
    """Its name, and what is in it; a file is read only where there is no text, be it an empty one."""
    if text is None:
        file = str(Path(path).absolute())
        return file, read_set_file(file)
    with part("set", "list"):
        return path, parse_list(text, path) if prefixes is None else prefixes


def _deadline_of(wish: RuleSpec, now: Clock) -> Deadline | None:
    if wish.until_s is not None:
        with part("until"):
            return Deadline.at(wish.until_s, now)
    return None if wish.seconds is None else Deadline.after(wish.seconds, now)


def given_prefixes(wish: RuleSpec) -> Prefixes | None:
    """Those of the text that it has; None: it has none."""
    if wish.set_path is None or wish.set_list is None:
        return None
    with part("set", "list"):
        return parse_list(wish.set_list, wish.set_path)


def parse_list(text: str, name: str) -> Prefixes:
    with translated():
        return parse_prefixes(text, name)


def check_has_list(wish: RuleSpec) -> None:
    """Raises InvalidInput."""
    if wish.set_path is not None and wish.set_list is None:
        with part("set", "list"):
            raise InvalidInput(f"set {wish.set_path}: list: missing: no existing rule uses this set")


def _compile(wish: RuleSpec) -> tuple[cbpf.Instruction, ...]:
    """libpcap's optimiser takes minutes for what is several times longer than the longest that is taken here."""
    mask = netmask(Interface(wish.interface)) if ifindex_of(wish.interface) else 0
    try:
        length = len(compile_expression(wish.expression, netmask=mask, optimise=False))
        if length > LONGEST_EXPRESSION:
            raise InvalidInput(
                f"expression {wish.expression[:40]}...: {length} classic BPF instructions, at most"
                f" {LONGEST_EXPRESSION}: put addresses into a file and use --set FILE"
            )
        return compile_expression(wish.expression, netmask=mask)
    except FilterError as error:
        raise InvalidInput(f"expression {wish.expression!r}: {' '.join(str(error).split())}") from error


def read_set_file(path: str) -> Prefixes:
    with translated():
        return read_prefixes(Path(path))
