"""README.md and docs/ against the code: links, command lines, JSON keys, metrics, the library, keys of lb.toml."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

import lb
from filters.cli import options as dump_options
from filters.errors import DumpError
from lb.api.access import Entry
from lb.api.models.explain import ExplanationAnswer
from lb.api.models.stages import StageAnswer
from lb.cli.main import cli
from lb.decap import output as decap_output
from lb.decap.values import DecapReport, DecapStatus
from lb.doctor.checks import Finding, Severity, findings_document
from lb.firewall import documents as filter_documents
from lb.formats import documents
from lb.formats.config import BACKEND_KEYS, SERVICE_KEYS
from lb.formats.prometheus import exposition
from lb.hashing.ring import Plan
from lb.model import rule_report
from lb.model.conditions import Condition
from lb.model.forwarding import Attachment, Counters
from lb.model.report import BackendStatus, Change, InterfaceStatus, Report, ServiceStatus, Status
from lb.model.rule_report import Counts, FilterReport, RuleChange, RuleStatus
from lb.model.rules import Action, At, Rule, SetSource
from lb.model.state import Backend, Interface, Mode, Service
from lb.model.vip import Vip
from lb.runtime.metrics import DaemonMetrics

ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").exists())
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAN_PAGES = sorted((ROOT / "docs/man").glob("*.md"))
CODE = ("fence", "code_block")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def tokens(page: Path) -> tuple[Token, ...]:
    """Blocks, and what is in the lines of them."""
    found = MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))
    return tuple(token for block in found for token in (block, *(block.children or ())))


# Links


@cache
def anchors(page: Path) -> frozenset[str]:
    """As GitHub makes them of headings."""
    blocks = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    titles = (b.content for a, b in pairwise(blocks) if a.type == "heading_open")
    return frozenset(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles)


def links(page: Path) -> list[str]:
    return [str(token.attrs["href"]) for token in tokens(page) if token.type == "link_open"]


def is_broken(page: Path, link: str) -> bool:
    where, _, anchor = link.partition("#")
    target = page.parent / where if where else page
    return not target.exists() or (bool(anchor) and anchor not in anchors(target))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    own = [link for link in links(page) if not link.startswith("https://")]
    assert [link for link in own if is_broken(page, link)] == []


def test_every_page_is_reached_from_the_readme() -> None:
    assert {ROOT / link for link in links(ROOT / "README.md") if link.endswith(".md")} == set(PAGES[1:])


# Command lines


class WrongCommand(Exception):
    pass


def command_of(words: Sequence[str]) -> tuple[click.Command, list[str]]:
    """Of the words behind `xdp-lb`: the command, and what is left for it."""
    command, rest = cli, list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            raise WrongCommand(f"{rest[0]}: no such command")
        command = command.commands[rest.pop(0)]  # type: ignore[assignment]
    return command, rest


def check_whole(line: str) -> None:
    """A line that could be typed."""
    program, *words = shlex.split(line, comments=True)
    words = words[: next((i for i, word in enumerate(words) if word in ("|", ">", "&&")), len(words))]
    if program.endswith("xdp-dump"):
        dump_options.parse(words)
        return
    command, rest = command_of(words)
    if isinstance(command, click.Group):
        raise WrongCommand("a command is missing")
    command.make_context(command.name, rest, parent=click.Context(cli, info_name="xdp-lb"))


def check_named(text: str) -> None:
    """Words in a sentence: arguments may be missing, commands and options may not be wrong."""
    program, *words = text.split()
    if words[:1] == ["COMMAND"]:
        return
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    if program == "xdp-dump":
        known = {f"--{name.rstrip('=')}" for name in dump_options._LONG}
    else:
        command, _ = command_of(words)
        known = {opt for p in command.params for opt in (*p.opts, *p.secondary_opts)} | {"--help"}
    if unknown := set(options) - known:
        raise WrongCommand(f"{', '.join(unknown)}: no such option")


def fault_of(check: Any, text: str) -> str | None:
    try:
        check(text)
    except (WrongCommand, click.ClickException, dump_options.UsageError, DumpError) as error:
        return f"{text}: {error.format_message() if isinstance(error, click.ClickException) else error}"
    return None


def whole_lines(text: str) -> Iterator[str]:
    for line in text.replace("\\\n", " ").splitlines():
        if found := re.match(r"\s*(?:[#$] )?((?:\.venv/bin/)?xdp-(?:lb|dump) [^( ].*)", line):
            yield found[1]
        yield from re.findall(r"(?:&& |<\()((?:\.venv/bin/)?xdp-lb [^)#]*)", line)


def lines_of(page: Path) -> list[str]:
    return [line for token in tokens(page) if token.type in CODE for line in whole_lines(token.content)]


def named_in(page: Path) -> list[str]:
    inline = [" ".join(token.content.split()) for token in tokens(page) if token.type == "code_inline"]
    return [text for text in inline if text.startswith(("xdp-lb ", "xdp-dump "))]


@pytest.mark.parametrize("page", [*PAGES, *MAN_PAGES], ids=name_of)
def test_every_command_line_is_one_that_the_commands_take(page: Path) -> None:
    faults = [fault_of(check_whole, line) for line in lines_of(page)]
    faults += [fault_of(check_named, text) for text in named_in(page)]
    assert [fault for fault in faults if fault] == []


def test_command_lines_are_found() -> None:
    """Were none found, none would be wrong."""
    assert len([line for page in PAGES for line in lines_of(page)]) > 40
    assert len([text for page in PAGES for text in named_in(page)]) > 30


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (check_whole, "xdp-lb backend ad 10.0.0.1:80 10.0.0.11"),
        (check_whole, "xdp-lb backend add 10.0.0.1:80"),
        (check_whole, "xdp-lb backend"),
        (check_whole, "xdp-lb vip add 10.0.0.1:80 --mod nat"),
        (check_whole, "xdp-dump --att xdp"),
        (check_named, "xdp-lb vip chang"),
        (check_named, "xdp-lb vip set --ecco"),
        (check_named, "xdp-dump --joson"),
    ],
)
def test_a_wrong_command_line_is_found(check: Any, text: str) -> None:
    assert fault_of(check, text)


def leaves(group: click.Group) -> Iterator[click.Command]:
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from leaves(command)
        else:
            yield command


@pytest.mark.parametrize("command", list(leaves(cli)), ids=lambda c: f"{c.name}-{c.callback.__module__}")
def test_the_examples_in_the_help_of_a_command_are_right(command: click.Command) -> None:
    lines = list(whole_lines((command.help or "").partition("Examples:")[2]))
    assert lines
    assert [fault for fault in (fault_of(check_whole, line) for line in lines) if fault] == []


# JSON


VIP = Vip.parse("10.0.0.1:80")
BACKEND = Backend.parse("10.0.0.11:80")
SERVICE = Service(VIP, Mode.NAT, (BACKEND,))
ATTACHED = Attachment("eth0", "native", 7)
RULE = Rule(0, "eth0", At.XDP, Action.DROP, "udp", b"", None, SetSource("bad", "src", 1))
STATUS = Status(
    "default",
    True,
    (InterfaceStatus(Interface("eth0"), ATTACHED),),
    (ServiceStatus(SERVICE, 0, (BackendStatus(BACKEND, True, Counters(), Condition(True, 100, "why", 1)),)),),
    {},
    {},
)
CHANGES = Report((Change(VIP, SERVICE, SERVICE, Plan(251, 1, 1, 0)),), (ATTACHED,), ("eth1",))
FILTERS = (
    filter_documents.status_document([RuleStatus(RULE, 1, Counts(), True, None)]),
    filter_documents.report_document(FilterReport((RuleChange("added", RULE, 1, ""),))),
    filter_documents.trial_document(rule_report.FilterTestResult((RULE,), {0: 1}, 1, 1, 0)),
)
DECAP = decap_output.status_document(DecapStatus("default", (ATTACHED,), None, None))
# Section of docs/json.md -> what it describes. The services before and after a change are those of `status`.
DOCUMENTS: dict[str, object] = {
    "status": documents.status_document(STATUS),
    "Change reports": documents.report_document(
        Report(tuple(Change(c.vip, None, None, c.plan) for c in CHANGES.changes), (ATTACHED,), ("eth1",))
    ),
    "filter": FILTERS,
    "explain": dict.fromkeys(ExplanationAnswer.model_fields),
    "decap": (DECAP, decap_output.report_document(DecapReport((ATTACHED,)))),
    "doctor": findings_document([Finding("kernel", Severity.OK, "6.1")]),
    "stage": dict.fromkeys(StageAnswer.model_fields),
    "token, audit": dict.fromkeys(field.name for field in fields(Entry)),
}


def keys_of(document: object) -> set[str]:
    if isinstance(document, dict):
        return set(document) | {key for value in document.values() for key in keys_of(value)}
    if isinstance(document, list | tuple):
        return {key for value in document for key in keys_of(value)}
    return set()


def section(page: Path, title: str) -> list[Token]:
    found = MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))
    heads = [i for i, token in enumerate(found) if token.type == "heading_open" and token.tag == "h2"]
    start = next(i for i in heads if found[i + 1].content == title)
    return found[start + 3 : next((i for i in heads if i > start), len(found))]


def code_words(found: Sequence[Token]) -> set[str]:
    return {
        token.content.removesuffix("[]")
        for block in found
        for token in block.children or ()
        if token.type == "code_inline"
    }


def first_cells(found: Sequence[Token]) -> list[Token]:
    return [found[i + 2] for i, token in enumerate(found[:-2]) if token.type == "tr_open"]


@pytest.mark.parametrize("title", DOCUMENTS)
def test_every_key_of_a_document_is_described(title: str) -> None:
    assert keys_of(DOCUMENTS[title]) - code_words(section(ROOT / "docs/json.md", title)) == set()


@pytest.mark.parametrize("title", DOCUMENTS)
def test_every_key_that_is_described_is_one(title: str) -> None:
    said = code_words(first_cells(section(ROOT / "docs/json.md", title)))
    assert said - keys_of(DOCUMENTS[title]) - {"options"} == set()


# lb.toml


def test_the_manual_of_lb_toml_has_all_its_keys() -> None:
    found = tokens(ROOT / "docs/man/lb.toml.5.md")
    items = [b for a, b in pairwise(found) if a.type == "inline" and b.type == "code_inline"]
    said = [token.content for token in items if re.fullmatch(r"[a-z_]+", token.content)]
    assert said == [*SERVICE_KEYS, *BACKEND_KEYS]


def test_the_options_of_a_service_are_described_with_their_keys() -> None:
    text = (ROOT / "docs/service-options.md").read_text()
    for key in set(SERVICE_KEYS) - {"vip", "mode", "ring_size", "flow_timeout", "backends"}:
        assert f"| `{key}` |" in text, key


# Metrics


def test_the_metrics_described_are_those_there_are() -> None:
    text = exposition(STATUS) + DaemonMetrics().exposition()
    there = set(re.findall(r"^# TYPE (xdp_lb_\w+)", text, re.MULTILINE))
    said = {word for word in code_words(tokens(ROOT / "docs/monitoring.md")) if word.startswith("xdp_lb_")}
    assert said == {name for name in there if not name.endswith("_created")}


# The library


def snippets() -> Iterator[ast.AST]:
    for page in PAGES:
        for token in tokens(page):
            if token.type == "fence" and token.info == "python":
                yield ast.parse(token.content, name_of(page))


def test_the_examples_in_python_use_what_there_is() -> None:
    """Those of docs/api.md are run elsewhere."""
    nodes = [node for snippet in snippets() for node in ast.walk(snippet)]
    imported = [alias.name for n in nodes if isinstance(n, ast.ImportFrom) and n.module == "lb" for alias in n.names]
    assert len(imported) > 10
    assert [name for name in imported if not hasattr(lb, name)] == []
    used = [(n.value.id, n.attr) for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    with lb.Client("http://xdp-lb") as client:
        owners = {"balancer": lb.Balancer, "client": client}
        known = [(name, attribute) for name, attribute in used if name in owners]
        assert len(known) > 5
        assert [(name, attribute) for name, attribute in known if not hasattr(owners[name], attribute)] == []


def test_the_methods_described_are_those_of_the_balancer() -> None:
    words = code_words(section(ROOT / "docs/library.md", "In process"))
    methods = [found[1] for word in words if (found := re.match(r"(\w+)\(", word))]
    assert len(methods) > 10
    assert [name for name in methods if not hasattr(lb.Balancer, name)] == []


# The layout


def test_the_files_that_the_architecture_names_are_there() -> None:
    files = [f"/{path.relative_to(ROOT)}" for top in ("lb", "filters", "xdp") for path in (ROOT / top).rglob("*.*")]
    named = [w for w in code_words(tokens(ROOT / "docs/architecture.md")) if re.search(r"\.(py|h|c)$", w)]
    assert len(named) > 50
    assert [name for name in named if not any(file.endswith(f"/{name}") for file in files)] == []


def rows() -> dict[str, set[str]]:
    """Package of lb/ -> what docs/architecture.md says it may import."""
    found = section(ROOT / "docs/architecture.md", "Packages of lb/")
    texts = [b.content for a, b in pairwise(found) if a.type in ("th_open", "td_open")]
    cells = list(zip(texts[3::3], texts[5::3], strict=True))
    return {name.strip("`"): {word for word in may.split(" (")[0].split(", ") if word} for name, may in cells}


def test_the_packages_of_the_architecture_are_those_that_the_layers_are_held_to() -> None:
    tree = ast.parse((ROOT / "lb/tests/test_layers.py").read_text())
    table = next(n.value for n in tree.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "MAY_IMPORT")
    assert table
    held = {package: set(may) for package, may in ast.literal_eval(table).items() if package.startswith("lb.")}
    packages = {name.removeprefix("lb."): {m.removeprefix("lb.") for m in may} for name, may in held.items()}
    assert list(rows()) == [name for name in packages if name not in ("errors", "paths")]
    for name, may in rows().items():
        assert name == "cli" or may == packages[name], name
