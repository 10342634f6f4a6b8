"""RuleSpec -> Rule, validated and compiled."""

from __future__ import annotations

from pathlib import Path

from filters.compiler import cbpf
from filters.compiler.expr import compile_expression
from filters.errors import FilterError, TooLong
from filters.interfaces import Interface, netmask
from filters.programs.sets import Prefixes, parse_prefixes, read_prefixes
from filters.selftest.selftest import check
from lb.dataplane.errors import translated
from lb.errors import InvalidInput, part
from lb.firewall.kernel import HOOKS
from lb.host.interfaces import check_interface, ifindex_of
from lb.model.rule_report import ApplyOptions, RuleSpec
from lb.model.rules import Clock, Deadline, Rule, SetSource


def new_rule(
    spec: RuleSpec, slot: int, now: Clock, options: ApplyOptions, prefixes: Prefixes | None = None
) -> tuple[Rule, Prefixes | None]:
    """`prefixes`: those of its set, if parsed already."""
    check_interface(spec.interface)
    rule, found = build_rule(spec, slot, now, prefixes)
    if options.selftest:
        with translated(), part("expression"):
            check(cbpf.decode(rule.instructions), HOOKS[rule.at])
    return rule, found


def build_rule(spec: RuleSpec, slot: int, now: Clock, prefixes: Prefixes | None = None) -> tuple[Rule, Prefixes | None]:
    with part("expression"):
        instructions = cbpf.encode(_compile(spec))
    source = None
    if spec.set_path is not None:
        path, prefixes = _set(spec.set_path, spec.set_list, prefixes)
        source = SetSource(path, spec.set_side, len(prefixes))
    deadline = _deadline_of(spec, now)
    rule = Rule(slot, spec.interface, spec.at, spec.action, spec.expression, instructions, spec.rate, source, deadline)
    return rule, prefixes


def _set(path: str, text: str | None, prefixes: Prefixes | None) -> tuple[str, Prefixes]:
    """Name and prefixes of the set; the file is only read if there is no text (an empty text counts)."""
    if text is None:
        file = str(Path(path).absolute())
        return file, read_set_file(file)
    with part("set", "list"):
        return path, parse_list(text, path) if prefixes is None else prefixes


def _deadline_of(spec: RuleSpec, now: Clock) -> Deadline | None:
    if spec.until_s is not None:
        with part("until"):
            return Deadline.at(spec.until_s, now)
    return None if spec.seconds is None else Deadline.after(spec.seconds, now)


def given_prefixes(spec: RuleSpec) -> Prefixes | None:
    """Prefixes of the spec's text; None without text."""
    if spec.set_path is None or spec.set_list is None:
        return None
    with part("set", "list"):
        return parse_list(spec.set_list, spec.set_path)


def parse_list(text: str, name: str) -> Prefixes:
    with translated():
        return parse_prefixes(text, name)


def check_has_list(spec: RuleSpec) -> None:
    """Raises InvalidInput."""
    if spec.set_path is not None and spec.set_list is None:
        with part("set", "list"):
            raise InvalidInput(f"set {spec.set_path}: list: missing: no existing rule uses this set")


def _compile(spec: RuleSpec) -> tuple[cbpf.Instruction, ...]:
    mask = netmask(Interface(spec.interface)) if ifindex_of(spec.interface) else 0
    try:
        return compile_expression(spec.expression, netmask=mask)
    except TooLong as error:
        raise InvalidInput(
            f"expression {spec.expression[:40]}...: {error}, or put addresses into a file and use --set FILE"
        ) from error
    except FilterError as error:
        raise InvalidInput(f"expression {spec.expression!r}: {' '.join(str(error).split())}") from error


def read_set_file(path: str) -> Prefixes:
    with translated():
        return read_prefixes(Path(path))
