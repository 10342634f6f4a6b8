"""Long lists of hosts, networks and ports in an expression: compared by binary search.

libpcap compares with each in turn, and its optimiser takes minutes for a thousand. Enters: the text of an expression,
and a function that compiles one. Leaves: the classic program of the same filter. Each run `host A or host B or ...` is
compiled as a single term that stands for all; where the program compares with it, a search through the sorted values
is put in. What stands for a list is found by compiling with two different values: the programs differ there only.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address

from filters.compiler import cbpf
from filters.compiler.cbpf import Instruction

SHORTEST = 16  # shorter lists are left to libpcap
_LEAF = 4  # values that are compared in turn
_NEAR = 0xFF // 3

_OR, _AND = ("or", "||"), ("and", "&&")
_TOKEN = re.compile(r"\(|\)|\|\||&&|[^\s()]+")
_QUALIFIERS = {"ip", "tcp", "udp", "sctp", "src", "dst"}
_ADDRESS = re.compile(r"\d{1,3}(\.\d{1,3}){0,3}")
_PORT = re.compile(r"[1-9]\d{0,4}")

Compile = Callable[[str], tuple[Instruction, ...]]


@dataclass(frozen=True, slots=True)
class _Term:
    """`words` before the value, `suffix` behind it (a prefix length), the value as the program compares with it."""

    words: str
    suffix: str
    value: int

    @property
    def kind(self) -> tuple[str, str]:
        return self.words, self.suffix


@dataclass(slots=True)
class _List:
    words: str
    suffix: str
    values: set[int] = field(default_factory=set)
    standing_for: tuple[int, int] = (0, 0)

    def text(self, value: int) -> str:
        shown = value if self.words.endswith("port") else IPv4Address(value)
        return f"{self.words} {shown}{self.suffix}"


def compile_with_lists(expression: str, compile_plain: Compile) -> tuple[Instruction, ...]:
    """What `compile_plain` makes of an expression, where it has no long lists. Raises what that raises."""
    parts = list(_parts(_TOKEN.findall(expression)))
    lists = [part for part in parts if isinstance(part, _List)]
    if not lists:
        return compile_plain(expression)
    _choose(lists)
    one, other = (
        compile_plain(" ".join(part if isinstance(part, str) else part.text(part.standing_for[n]) for part in parts))
        for n in (0, 1)
    )
    places = _places(one, other, lists)
    return compile_plain(expression) if places is None else _expanded(one, places)


# The text


def _parts(tokens: Sequence[str]) -> Iterator[str | _List]:
    """Words, and in place of each long run of terms its lists."""
    at = 0
    while at < len(tokens):
        terms, end = _run(tokens, at) if _may_begin(tokens, at) else ([], at)
        if len(terms) < SHORTEST:
            end = max(end, at + 1)
            yield from tokens[at:end]
        else:
            yield from _joined(terms)
        at = end


def _may_begin(tokens: Sequence[str], at: int) -> bool:
    """`and` and `or` bind alike, from the left: a list may begin an expression or a bracket, or follow an `or`."""
    return at == 0 or tokens[at - 1] in ("(", *_OR)


def _run(tokens: Sequence[str], at: int) -> tuple[list[_Term], int]:
    """Terms joined by `or`, and where they end. Empty where a word without qualifiers follows, which would take those
    of the term before it."""
    terms: list[_Term] = []
    end = at
    while (found := _term(tokens, at, terms[-1] if terms else None)) is not None:
        term, end = found
        terms.append(term)
        if end >= len(tokens) or tokens[end] not in _OR:
            break
        at = end + 1
    if not terms:
        return [], at
    following = end + 1 if end < len(tokens) and tokens[end] in (*_OR, *_AND) else len(tokens)
    return ([] if _takes_qualifiers(tokens, following) else terms), end


def _takes_qualifiers(tokens: Sequence[str], at: int) -> bool:
    while at < len(tokens) and tokens[at] in ("not", "!", "("):
        at += 1
    return at < len(tokens) and re.match(r"[a-z]", tokens[at]) is None


def _term(tokens: Sequence[str], at: int, before: _Term | None) -> tuple[_Term, int] | None:
    """One that can be in a list, and where it ends; a value alone has the qualifiers of the term before it."""
    end = at
    while end < len(tokens) and tokens[end] in _QUALIFIERS:
        end += 1
    kind = tokens[end] if end < len(tokens) else ""
    if kind in ("host", "net", "port") and end + 1 < len(tokens):
        words, value, end = " ".join(tokens[at : end + 1]), tokens[end + 1], end + 2
    elif end > at and kind.count(".") == 3 and _ADDRESS.match(kind):
        words, value, end = f"{' '.join(tokens[at:end])} {'net' if '/' in kind else 'host'}", kind, end + 1
    elif before and end == at:
        words, value, end = before.words, kind, at + 1
    else:
        return None
    term = _valued(words, value)
    ends = end >= len(tokens) or tokens[end] in (")", *_OR, *_AND)
    return (term, end) if term and ends else None


def _valued(words: str, text: str) -> _Term | None:
    if words.endswith("port"):
        return _Term(words, "", int(text)) if _PORT.fullmatch(text) and int(text) < 1 << 16 else None
    address, slash, length = text.partition("/")
    numbers = [int(each) for each in address.split(".")] if _ADDRESS.fullmatch(address) else [256]
    if max(numbers) > 255:
        return None
    value = int.from_bytes(bytes(numbers).ljust(4, b"\0"), "big")
    if words.endswith("host"):
        return _Term(words, "", value) if len(numbers) == 4 and not slash else None
    if not slash:  # `net 10.1` is 10.1.0.0/16
        slash, length = "/", str(8 * len(numbers))
    elif len(numbers) < 4:
        return None
    if not length.isdecimal() or not 1 <= int(length) <= 32 or value & ((1 << 32 - int(length)) - 1):
        return None
    return _Term(words, f"/{length}", value)


def _joined(terms: Sequence[_Term]) -> Iterator[str | _List]:
    found: dict[tuple[str, str], _List] = {}
    for term in terms:
        found.setdefault(term.kind, _List(*term.kind)).values.add(term.value)
    for number, each in enumerate(found.values()):
        if number:
            yield "or"
        yield each


def _choose(lists: Sequence[_List]) -> None:
    """Two values for each to stand for it, different from those of others."""
    taken: set[int] = set()
    for each in lists:
        step = 1 << 32 - int(each.suffix[1:] or 32) if each.suffix else 1
        free = (n * step for n in range(1, 1 << 16) if n * step not in taken)
        each.standing_for = next(free) & cbpf.WORD, next(free) & cbpf.WORD
        taken |= set(each.standing_for)


# The program


def _places(
    one: Sequence[Instruction], other: Sequence[Instruction], lists: Sequence[_List]
) -> dict[int, list[int]] | None:
    """Instructions that compare with what stands for a list -> its values; None where the two differ otherwise."""
    values = {each.standing_for: sorted(each.values) for each in lists}
    found: dict[int, list[int]] = {}
    if len(one) != len(other):
        return None
    for number, (i, j) in enumerate(zip(one, other, strict=True)):
        if i == j:
            continue
        if i.code != cbpf.JMP | cbpf.JEQ or (i.code, i.jt, i.jf) != (j.code, j.jt, j.jf) or (i.k, j.k) not in values:
            return None
        found[number] = values[i.k, j.k]
    return found


def _expanded(program: Sequence[Instruction], places: dict[int, list[int]]) -> tuple[Instruction, ...]:
    """With a search at each place; those with the same values and targets share that of the last one."""
    code = _Code()
    searches: dict[object, int] = {}
    for number in places:
        searches[_search_key(program, places, number)] = number
    expanded = sorted(searches.values())
    for number, i in enumerate(program):
        code.place(number)
        if number not in places:
            code.copy(i, number, expanded)
        elif (last := searches[_search_key(program, places, number)]) != number:
            code.jump(last)
        else:
            yes, no = cbpf.targets(i, number)
            code.search(places[number], yes, no)
    return code.resolved()


def _search_key(program: Sequence[Instruction], places: dict[int, list[int]], number: int) -> object:
    return id(places[number]), cbpf.targets(program[number], number)


class _Code:
    """Instructions whose jumps lead to labels: numbers of the old program's instructions, or objects. Only the targets
    of JA may be far."""

    def __init__(self) -> None:
        self._instructions: list[tuple[Instruction, tuple[object, ...]]] = []
        self._at: dict[object, int] = {}

    def place(self, label: object) -> None:
        self._at[label] = len(self._instructions)

    def jump(self, to: object) -> None:
        self._instructions.append((Instruction(cbpf.JMP | cbpf.JA), (to,)))

    def copy(self, i: Instruction, number: int, expanded: Sequence[int]) -> None:
        if i.cls != cbpf.JMP:
            self._instructions.append((i, ()))
            return
        targets = cbpf.targets(i, number)
        if i.is_branch and any(_is_far(expanded, number, target) for target in targets):
            self._branch_far(i, *targets)
        else:
            self._instructions.append((i, targets))

    def _branch_far(self, i: Instruction, yes: object, no: object) -> None:
        there, otherwise = object(), object()
        self._instructions.append((i, (there, otherwise)))
        for label, to in ((there, yes), (otherwise, no)):
            self.place(label)
            self.jump(to)

    def search(self, values: Sequence[int], yes: object, no: object) -> None:
        if len(values) <= _LEAF:
            self._leaf(values, yes, no)
            return
        middle = len(values) // 2
        upper, right, left = object(), object(), object()
        self._instructions.append((Instruction(cbpf.JMP | cbpf.JGE, k=values[middle]), (right, left)))
        self.place(right)
        self.jump(upper)
        self.place(left)
        self.search(values[:middle], yes, no)
        self.place(upper)
        self.search(values[middle:], yes, no)

    def _leaf(self, values: Sequence[int], yes: object, no: object) -> None:
        found = object()
        for value in values:
            following = object()
            self._instructions.append((Instruction(cbpf.JMP | cbpf.JEQ, k=value), (found, following)))
            self.place(following)
        self.jump(no)
        self.place(found)
        self.jump(yes)

    def resolved(self) -> tuple[Instruction, ...]:
        return tuple(
            self._resolved(i, [self._at[target] - number - 1 for target in targets])
            for number, (i, targets) in enumerate(self._instructions)
        )

    @staticmethod
    def _resolved(i: Instruction, distances: Sequence[int]) -> Instruction:
        match distances:
            case [to]:
                return Instruction(i.code, k=to & cbpf.WORD)
            case [yes, no]:
                return Instruction(i.code, yes, no, i.k)
        return i


def _is_far(expanded: Sequence[int], number: int, target: int) -> bool:
    """Whether its eight bits may not do: over a search, or so many instructions that each may have become three."""
    at = bisect_left(expanded, number)
    return target - number > _NEAR or (at < len(expanded) and expanded[at] < target)
