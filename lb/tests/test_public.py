"""What `from lb import ...` gives, and what it leaves for later."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lb


def imported_by(code: str) -> set[str]:
    """The modules that a new process has after running `code`."""
    shown = f"import sys\n{code}\nprint(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("name", lb.__all__)
def test_each_public_name_is_there(name: str) -> None:
    assert getattr(lb, name).__name__ == name


def test_any_other_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = lb.Nothing


def test_a_name_brings_only_its_own_module() -> None:
    assert not imported_by("from lb import Vip") & {"sqlite3", "pyroute2", "httpx", "lb.control.balancer"}


# Starting a command is most of what it costs: what few commands need is imported by those.
HEAVY = {"asyncio", "fastapi", "httpx", "pydantic", "pyroute2", "rich", "sqlite3", "structlog", "tomllib", "uvicorn"}


@pytest.mark.parametrize("words", [["--help"], ["attach", "--help"], ["filter", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"from contextlib import suppress\nfrom lb.cli.main import cli\nwith suppress(SystemExit): cli({words!r})"
    assert not imported_by(code) & HEAVY


def test_the_list_of_what_is_stored_needs_neither_the_kernel_nor_the_daemon() -> None:
    code = (
        "from contextlib import suppress\nfrom lb.cli.main import cli\nfrom lb.client.connect import HostConnector\n"
        "with suppress(SystemExit): cli(['vip', 'list'], obj=HostConnector())"
    )
    assert not imported_by(code) & (HEAVY - {"sqlite3"} | {"xdp.libbpf", "lb.dataplane.dataplane"})


def test_a_table_needs_no_list_of_emoji() -> None:
    code = "from lb.formats.text import Column, table\ntable([Column('VIP')], [['10.0.0.1:80/tcp']], colour=True)"
    assert "rich._emoji_codes" not in imported_by(code)


def test_what_is_loaded_is_read_without_the_metadata_of_the_package() -> None:
    assert "importlib.metadata" not in imported_by("import lb.dataplane.dataplane")
