"""Man pages: docs/man/NAME.SECTION.md and the click commands -> roff, for man(1).

    python docs/man/make_pages.py FOLDER        writes FOLDER/man8/xdp-lb.8, ...

Prose (DESCRIPTION, FILES, SEE ALSO, ...) is Markdown here. SYNOPSIS, COMMANDS, COMMON OPTIONS and EXAMPLES come from
the commands, so they cannot differ from --help. Markdown is parsed by markdown-it-py, which is installed anyway, with
rich; pandoc and go-md2man would be one more package for the build, and know nothing of click. roff is that of man(7).

In prose, a list item that begins with `code`: is a tagged paragraph (an option and what it does).
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import click
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # a wheel is built from a tree that is not installed

from filters.cli.options import USAGE  # noqa: E402
from lb.cli.main import cli  # noqa: E402

PROSE = Path(__file__).parent
# Page -> the commands that are on it; None: all that no other page has.
COMMANDS: dict[str, tuple[str, ...] | None] = {
    "xdp-lb.8": None,
    "xdp-lb-decap.8": ("decap",),
    "xdp-lb-filter.8": ("filter",),
    "xdp-lb-serve.8": ("serve", "web", "token", "audit"),
    "xdp-lb-stage.8": ("stage",),
    "xdp-dump.8": (),
    "lb.toml.5": (),
}
MANUALS = {"5": "File Formats", "8": "System Administration"}
SHARED_BY = 3  # an option of so many commands of a page is described once
WIDTH = 78
VERBATIM = "\b"  # click's mark of a paragraph that is not wrapped


@dataclass(frozen=True, slots=True)
class Command:
    """`words`: xdp-lb backend add. `options`: as --help lists them, and what they do."""

    words: str
    usage: str
    paragraphs: tuple[str, ...]
    options: tuple[tuple[str, str], ...]


def main(folder: Path) -> None:
    for name in COMMANDS:
        page = folder / f"man{name[-1]}" / name
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(render(name), encoding="utf-8")


def render(name: str) -> str:
    """The page of that name."""
    title, *sections = read_prose(PROSE / f"{name}.md")
    commands = list(commands_of(name))
    lines = [*header(name), *title, *synopsis(name, commands)]
    for heading, body in sections:
        if heading == "SEE ALSO":
            lines += examples(commands)
        lines += [f".SH {heading}", *(group_help(name) if heading == "DESCRIPTION" else ()), *body]
        if heading == "DESCRIPTION":
            lines += [*descriptions(commands), *common_options(commands)]
    return "\n".join(without_needless_paragraphs(lines)) + "\n"


def without_needless_paragraphs(lines: Sequence[str]) -> Iterator[str]:
    """A heading begins a paragraph itself."""
    for before, line in pairwise(["", *lines]):
        if line != ".PP" or not before.startswith((".SH", ".SS")):
            yield line


def header(name: str) -> list[str]:
    title, _, section = name.rpartition(".")
    when = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    return [f'.TH {title.upper()} {section} "{when}" "xdp-lb {version()}" "{MANUALS[section]}"']


def version() -> str:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    return found[1]


# From the commands


def commands_of(page: str) -> Iterator[Command]:
    names = COMMANDS[page]
    elsewhere = {name for others in COMMANDS.values() for name in others or ()}
    for name, command in cli.commands.items():
        if name in names if names is not None else name not in elsewhere:
            yield from leaves(command, click.Context(cli, info_name="xdp-lb"), name)


def leaves(command: click.Command, parent: click.Context, name: str) -> Iterator[Command]:
    context = click.Context(command, parent, name, help_option_names=["-h", "--help"])
    if isinstance(command, click.Group):
        for child_name, child in command.commands.items():
            yield from leaves(child, context, child_name)
        return
    options = (p for p in command.get_params(context) if isinstance(p, click.Option))
    records = (option.get_help_record(context) for option in options)
    pieces = command.collect_usage_pieces(context)
    yield Command(context.command_path, " ".join(pieces), paragraphs(command), tuple(filter(None, records)))


def paragraphs(command: click.Command) -> tuple[str, ...]:
    return tuple(inspect.cleandoc(command.help or "").split("\n\n"))


def group_help(page: str) -> Iterator[str]:
    """What the group of commands says of itself."""
    names = COMMANDS[page]
    group = cli if names is None else cli.commands[names[0]] if len(names) == 1 else None
    if group is not None:
        yield from help_lines(p for p in paragraphs(group) if not is_examples(p))


def synopsis(page: str, commands: Sequence[Command]) -> Iterator[str]:
    lines = [f"{bold(command.words)} {escaped(command.usage)}".rstrip() for command in commands]
    if page == "xdp-dump.8":
        lines = guarded(escaped(USAGE.removeprefix("Usage: ").replace("\n       ", "\n")))
    if lines:
        yield from (".SH SYNOPSIS", ".nf", *lines, ".fi")


def descriptions(commands: Sequence[Command]) -> Iterator[str]:
    if not commands:
        return
    shared = shared_options(commands)
    yield ".SH COMMANDS"
    for command in commands:
        yield f".SS {escaped(f'{command.words} {command.usage}')}"
        yield from help_lines(p for p in command.paragraphs if not is_examples(p))
        for option in command.options:
            if option not in shared:
                yield from tagged(bold(option[0]), wrapped(option[1]))
        common = [bold(spelt(option)) for option in command.options if option in shared and not is_help(option)]
        if common:
            yield from (".PP", *textwrap.wrap(f"Common options: {', '.join(common)}.", WIDTH, break_on_hyphens=False))


def common_options(commands: Sequence[Command]) -> Iterator[str]:
    if commands:
        yield ".SH COMMON OPTIONS"
        for option in shared_options(commands):
            yield from tagged(bold(option[0]), wrapped(option[1]))


def shared_options(commands: Sequence[Command]) -> list[tuple[str, str]]:
    """In the order in which they first appear; --help is one of all commands."""
    times = Counter(option for command in commands for option in command.options)
    return [option for option, n in times.items() if n >= SHARED_BY or is_help(option)]


def is_help(option: tuple[str, str]) -> bool:
    return option[0].endswith("--help")


def spelt(option: tuple[str, str]) -> str:
    """Without its value: `--echo / --no-echo` is --echo."""
    return option[0].split(" / ")[0].split(", ")[-1].split()[0]


def is_examples(paragraph: str) -> bool:
    return paragraph.startswith(f"{VERBATIM}\nExamples:")


def help_lines(found: Iterator[str]) -> Iterator[str]:
    for paragraph in found:
        if not paragraph.startswith(VERBATIM):
            yield from (".PP", *wrapped(paragraph))
            continue
        first, *rest = paragraph.split("\n")[1:]
        label, _, text = first.partition(": ")
        if label == "JSON" and not text.startswith(("{", "[")):
            yield from (".PP", *wrapped(first))
            continue
        if label == "JSON":
            yield from verbatim("\n".join([first, *rest]))
        else:
            yield from (".PP", escaped(first), *verbatim("\n".join(rest)))


def examples(commands: Sequence[Command]) -> Iterator[str]:
    if commands:
        yield ".SH EXAMPLES"
    for command in commands:
        for paragraph in filter(is_examples, command.paragraphs):
            yield from example_lines(textwrap.dedent("\n".join(paragraph.split("\n")[2:])))


def example_lines(text: str) -> Iterator[str]:
    """A comment is said, what follows is shown."""
    for comment, shown in re.findall(r"((?:^# .*\n)*)((?:^(?!# ).*\n?)+)", text, re.MULTILINE):
        if comment:
            yield from (".PP", *wrapped(comment.replace("# ", "", 1).replace("\n# ", " ").strip() + ":"))
        yield from verbatim(shown.rstrip())


# From Markdown


def read_prose(path: Path) -> Iterator[list[str] | tuple[str, list[str]]]:
    """NAME, then each section with its lines."""
    text = path.read_text(encoding="utf-8")
    tokens = MarkdownIt().parse(text)
    name, _, summary = tokens[1].content.partition(" - ")
    yield [".SH NAME", rf"{escaped(name)} \- {escaped(summary)}"]
    starts = [i for i, token in enumerate(tokens) if token.type == "heading_open" and token.tag == "h2"]
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        yield tokens[start + 1].content, list(blocks(tokens[start + 3 : end]))


def blocks(tokens: Sequence[Token]) -> Iterator[str]:
    in_item = False
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type in ("fence", "code_block"):
            yield from verbatim(token.content.rstrip())
        elif token.type == "list_item_open":
            in_item = True
        elif token.type == "list_item_close":
            in_item = False
        elif token.type == "inline" and before and before.type == "heading_open":
            yield f".SS {inline(token.children or [])}"
        elif token.type == "inline":
            yield from item(token) if in_item else (".PP", *guarded(inline(token.children or [])))
        elif not token.type.endswith(("_open", "_close")):
            raise ValueError(f"{token.type}: not known in man pages")


def item(token: Token) -> Iterator[str]:
    tag, *rest = token.children or []
    if tag.type == "code_inline" and rest and rest[0].content.startswith(":"):
        text = inline(rest)[1:].lstrip()
        yield from (".TP", bold(tag.content), *guarded(text))
    elif tag.type == "text" and not tag.content and rest:  # markdown-it begins an item with what is empty
        yield from (r".IP \(bu 2", *guarded(inline(rest)))
    else:
        yield from (r".IP \(bu 2", *guarded(inline([tag, *rest])))


MARKS = {"strong_open": r"\fB", "strong_close": r"\fR", "em_open": r"\fI", "em_close": r"\fR"}


def inline(tokens: Sequence[Token]) -> str:
    found = []
    for token in tokens:
        if token.type == "code_inline":
            found.append(bold(token.content))
        elif token.type == "text":
            found.append(escaped(token.content))
        elif token.type == "softbreak":
            found.append("\n")
        elif token.type in MARKS:
            found.append(MARKS[token.type])
        else:
            raise ValueError(f"{token.type}: not known in man pages")
    return "".join(found)


# roff


def escaped(text: str) -> str:
    return text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq").replace("`", r"\(ga")


def guarded(text: str) -> list[str]:
    """Lines, none of which is taken for a request."""
    return [rf"\&{line}" if line.startswith((".", "'")) else line for line in text.split("\n")]


def bold(text: str) -> str:
    return rf"\fB{escaped(text)}\fR"


def wrapped(text: str) -> list[str]:
    return guarded(escaped("\n".join(textwrap.wrap(" ".join(text.split()), WIDTH, break_on_hyphens=False))))


def tagged(tag: str, lines: Sequence[str]) -> Iterator[str]:
    yield from (".TP", tag, *lines)


def verbatim(text: str) -> Iterator[str]:
    yield from (".PP", ".RS 4", ".nf", *guarded(escaped(textwrap.dedent(text))), ".fi", ".RE")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
