"""The tables of a stage, told to other processes."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path

import pytest

from lb.errors import DataplaneError
from lb.formats.documents import Document
from lb.stages.socket import TableSocket, ask_tables

TABLES: list[Document] = [{"table": "sources", "entries": [{"key": "x" * 100_000, "value": 1, "per_second": None}]}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Longer than the address of a Unix socket may be."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    return folder / "1.sock"


def asking(path: Path) -> tuple[threading.Thread, list[Document]]:
    found: list[Document] = []
    thread = threading.Thread(target=lambda: found.extend(ask_tables(path, 1)))
    thread.start()
    return thread, found


def test_tables_are_those_of_the_moment_of_the_question(path: Path) -> None:
    with closing(TableSocket(path)) as socket:
        socket.answer(unasked)
        asked = [asking(path) for _ in range(3)]
        while any(thread.is_alive() for thread, _ in asked):
            socket.answer(lambda: TABLES)
        assert [found for _, found in asked] == [TABLES] * 3
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


def unasked() -> list[Document]:
    raise AssertionError("nobody has asked")


def test_place_of_a_process_that_was_killed_is_taken_over(path: Path) -> None:
    left = TableSocket(path)
    with closing(TableSocket(path)) as socket:
        thread, found = asking(path)
        while thread.is_alive():
            socket.answer(lambda: TABLES)
        assert found == TABLES
    left.close()


@pytest.mark.parametrize("name", ["1.sock", "none/1.sock"])
def test_stage_that_nobody_answers_for_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataplaneError, match="stage 1: cannot read tables from its process"):
        ask_tables(tmp_path / name, 1)
