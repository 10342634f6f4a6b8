"""A daemon in a thread of its own, over a host in memory or whatever else an opener gives."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from structlog.testing import capture_logs

from lb.client.balancer import RemoteBalancer
from lb.control.balancer import Balancer
from lb.daemon.server import Daemon, Settings, Task
from lb.tests.cli.test_cli import Host

READY_S = 20


class Running:
    """`call` runs a method of the daemon in its own thread, as a signal would."""

    def __init__(
        self, opener: Callable[[], AbstractContextManager[Balancer]], settings: Settings, tasks: Sequence[Task]
    ) -> None:
        self.settings = settings
        self.error: BaseException | None = None
        self.said: Sequence[Mapping[str, Any]] = ()  # what it has logged
        self._opener, self._tasks = opener, tasks
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.daemon: Daemon
        self._loop: asyncio.AbstractEventLoop

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self.error = error
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.daemon = Daemon(self._opener, self.settings, self._tasks, on_ready=self._ready.set)
        await self.daemon.run()

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(READY_S), "the daemon is not ready"
        if self.error:
            raise self.error

    def call(self, method: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(method)

    def join(self) -> None:
        self._thread.join(READY_S)
        assert not self._thread.is_alive(), "the daemon does not end"
        if self.error:
            raise self.error

    def stop(self) -> None:
        if self._thread.is_alive():
            self.call(self.daemon.stop)
        self.join()


def settings_in(directory: Path, **more: Any) -> Settings:
    return Settings(directory / "api.sock", directory / "access.db", **more)


@contextmanager
def running(
    opener: Callable[[], AbstractContextManager[Balancer]], settings: Settings, tasks: Sequence[Task] = ()
) -> Iterator[Running]:
    """Ready, until the end of the body."""
    with capture_logs() as said:
        daemon = Running(opener, settings, tasks)
        daemon.said = said
        daemon.start()
        try:
            yield daemon
        finally:
            daemon.stop()


@contextmanager
def serving(host: Host, directory: Path, tasks: Sequence[Task] = (), **more: Any) -> Iterator[Running]:
    """The daemon of a host in memory."""
    with running(lambda: host.open(write=True), settings_in(directory, **more), tasks) as daemon:
        yield daemon


def through(host: Host, daemon: Running) -> Callable[..., AbstractContextManager[RemoteBalancer]]:
    """What a command opens where the daemon runs."""
    from lb.client.client import Client

    @contextmanager
    def opener(*, write: bool) -> Iterator[RemoteBalancer]:
        with Client.unix(daemon.settings.socket) as client:
            yield RemoteBalancer(client, host.network)

    return opener
