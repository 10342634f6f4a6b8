"""A host in memory for tests of commands: its store is a file, its kernel and network are doubles."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from lb.cli.main import cli
from lb.control.balancer import Balancer
from lb.model.state import State
from lb.store.store import Store
from lb.tests.fakes.memory import MemoryDataplane, MemoryNetwork

WEB = "10.0.0.1:80/tcp"
RING = ("--ring-size", "251")


class Opening:
    """A Connector of nothing but an opener."""

    def __init__(self, opener: Callable[..., AbstractContextManager[Any]]) -> None:
        self.open = opener

    def state(self) -> State:
        with self.open(write=False) as balancer:
            state: State = balancer.state
            return state


@dataclass
class Host:
    """One host: its store, dataplane and network outlive the commands, as they do in the kernel."""

    store: Path
    dataplane: MemoryDataplane = field(default_factory=MemoryDataplane)
    network: MemoryNetwork = field(
        default_factory=lambda: MemoryNetwork(
            {"eth0": ["10.0.0.1/24", "2001:db8::1/64"], "eth1": ["10.1.0.1/24"], "eth2": []}
        )
    )

    @contextmanager
    def open(self, *, write: bool) -> Iterator[Balancer]:
        with Store.open(self.store, write) as store:
            store.load()
            yield Balancer(store, self.dataplane, self.network)

    def state(self) -> State:
        with Store.open(self.store, write=False) as store:
            return store.load()

    def run(self, *words: str) -> Result:
        return CliRunner().invoke(cli, words, obj=self)

    def lines(self, *words: str) -> list[str]:
        result = self.run(*words)
        assert (result.exit_code, result.stderr) == (0, ""), result.stderr
        return result.stdout.splitlines()

    def json(self, *words: str) -> Any:
        return json.loads("\n".join(self.lines(*words, "--json")))

    def error(self, *words: str, status: int = 1) -> str:
        """The one line of a command that fails."""
        result = self.run(*words)
        assert (result.exit_code, result.stdout) == (status, "")
        assert result.stderr.count("\n") == 1
        return result.stderr.removesuffix("\n")

    def names(self) -> list[str]:
        return [each["backend"] for each in self.json("backend", "list")]
