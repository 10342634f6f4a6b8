"""The man pages as `make man` writes them: whole, about the commands as they are, and well-formed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from filters.cli import main as dump_cli
from filters.cli import options as dump_options
from lb.cli.main import cli

ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").exists())
NAMES = [path.stem for path in sorted((ROOT / "docs/man").glob("*.md"))]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, "docs/man/make_pages.py", str(folder)], cwd=ROOT, check=True)
    return {path.name: path for path in folder.glob("man[58]/*")}


def commands(group: click.Group = cli, *words: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *words, name)
        else:
            yield " ".join(["xdp-lb", *words, name]), command


COMMANDS = dict(commands())


def plain(page: Path) -> str:
    """What it says, without roff."""
    text = re.sub(r"\\f[BIR]|\\&", "", page.read_text())
    return text.replace(r"\-", "-").replace(r"\(aq", "'").replace(r"\(ga", "`").replace(r"\e", "\\")


def headings(page: Path) -> list[str]:
    """Of commands, without their arguments."""
    found = re.findall(r"^\.SS (xdp-lb .*)$", plain(page), re.MULTILINE)
    return [heading.partition(" [OPTIONS]")[0] for heading in found]


def options_in(text: str) -> set[str]:
    """In the tags of tagged paragraphs."""
    tags = re.findall(r"^\.TP\n(-.*)$", text, re.MULTILINE)
    return {word for tag in tags for word in re.findall(r"(?<![\w-])--?[A-Za-z#][\w-]*", tag)}


def options_of(command: click.Command) -> set[str]:
    options = (param for param in command.params if isinstance(param, click.Option))
    return {name for option in options for name in (*option.opts, *option.secondary_opts)} | {"-h", "--help"}


def test_every_command_is_on_one_page(pages: dict[str, Path]) -> None:
    assert sorted(heading for page in pages.values() for heading in headings(page)) == sorted(COMMANDS)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("xdp-lb")])
def test_a_page_has_the_options_of_its_commands_and_no_others(pages: dict[str, Path], name: str) -> None:
    own = [COMMANDS[heading] for heading in headings(pages[name])]
    assert options_in(plain(pages[name])) == {option for command in own for option in options_of(command)}


def test_an_option_of_one_command_is_described_there(pages: dict[str, Path]) -> None:
    text = plain(pages["xdp-lb-serve.8"]).partition(".SS xdp-lb serve")[2].partition("\n.S")[0]
    assert options_in(text) == options_of(COMMANDS["xdp-lb serve"]) - {"-h", "--help"}


def test_the_page_of_xdp_dump_has_its_options(pages: dict[str, Path]) -> None:
    short = {f"-{letter}" for letter in dump_options._FLAGS + dump_options._WITH_VALUE}
    long = {f"--{name.rstrip('=')}" for name in dump_options._LONG}
    assert options_in(plain(pages["xdp-dump.8"])) == short | long


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_well_formed(pages: dict[str, Path], name: str) -> None:
    for check in (["mandoc", "-T", "lint", "-W", "warning"], ["groff", "-ww", "-man", "-z", "-T", "utf8"]):
        done = subprocess.run([*check, str(pages[name])], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", NAMES)
def test_a_page_can_be_read(pages: dict[str, Path], name: str) -> None:
    shown = subprocess.run(
        ["mandoc", "-T", "ascii", str(pages[name])], capture_output=True, text=True, check=True
    ).stdout
    text = re.sub(r".\x08", "", shown)  # bold is a letter typed twice
    title = name.rpartition(".")[0]
    assert re.search(rf"^NAME\n +{title} - \S", text, re.MULTILINE)
    assert {"NAME", "DESCRIPTION", "EXAMPLES", "SEE ALSO"} <= set(re.findall(r"^[A-Z ]+$", text, re.MULTILINE))


@pytest.mark.parametrize("words", [*COMMANDS, "xdp-lb", "xdp-lb vip", "xdp-lb filter", "xdp-lb stage", "xdp-lb token"])
def test_every_command_answers_help(words: str) -> None:
    result = CliRunner().invoke(cli, [*words.split()[1:], "--help"], prog_name="xdp-lb")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: {words} [OPTIONS]")


def test_xdp_dump_answers_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert dump_cli.run(["--help"]) == 0
    assert dump_options.USAGE in capsys.readouterr().out
