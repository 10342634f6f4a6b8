"""Whether a daemon listens, and what a command is told by one that does not accept."""

from __future__ import annotations

import socket
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from lb.client import connect
from lb.client.connect import daemon_listens
from lb.errors import DaemonError


def test_a_socket_of_nobody_is_no_daemon(tmp_path: Path) -> None:
    assert not daemon_listens(tmp_path / "api.sock")
    with closing(socket.socket(socket.AF_UNIX)) as left:
        left.bind(str(tmp_path / "api.sock"))
    assert not daemon_listens(tmp_path / "api.sock")


def test_a_daemon_that_accepts_nothing_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "ACCEPT_S", 1)
    path = tmp_path / "api.sock"
    with ExitStack() as stack:
        listening = stack.enter_context(closing(socket.socket(socket.AF_UNIX)))
        listening.bind(str(path))
        listening.listen(0)
        assert daemon_listens(path)  # fills its backlog
        with pytest.raises(DaemonError, match=f"^daemon: {path} accepts no connection within 1 s: check its log$"):
            daemon_listens(path)
