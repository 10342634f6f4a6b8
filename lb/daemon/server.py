"""The daemon: one balancer for its lifetime, the API, and background tasks.

Enters: paths, listen addresses, tasks. Leaves: a kernel that holds the stored configuration. The daemon holds the
writer's lock of its network namespace from start to end; starting and stopping it does not affect traffic.

A Task is started once the kernel has been reconciled, uses the balancer through the BalancerThread, and is cancelled at
the end. A failed task is logged and restarted.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import structlog

from lb.api.access import Access
from lb.api.app import create_app
from lb.api.measured import Measured
from lb.api.middleware import AccessMiddleware, AccessThread
from lb.api.sessions import Sessions
from lb.control.balancer import Balancer
from lb.daemon.listener import Listener, load_certificate, tcp_socket, tls_context, unix_socket
from lb.daemon.sd_notify import feed_watchdog, notify
from lb.errors import LbError, PruneRequired
from lb.formats import config
from lb.model.desired import Desired
from lb.model.report import Report
from lb.paths import Paths
from lb.runtime.balancer_thread import BalancerThread
from lb.runtime.features import FeatureThreads
from lb.runtime.rejections import Rejections

log = structlog.get_logger("xdp-lb")

AGAIN_S = 5.0  # after a task has failed
STARTING = "starting: writing the stored configuration to the kernel"


class Task(Protocol):
    """A background task."""

    async def run(self, thread: BalancerThread) -> None: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """socket: Unix socket of the API. listen: address and port for TLS. config: lb.toml with the desired services.
    paths: for filters, explain and stages in the API; None: without them. allowed_hosts: names besides its addresses by
    which clients call the daemon."""

    socket: Path
    access: Path
    listen: tuple[tuple[str, int], ...] = ()
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    config: Path | None = None
    paths: Paths | None = None
    allowed_hosts: tuple[str, ...] = ()


class Daemon:
    """`on_ready` is called once the kernel holds the stored configuration."""

    def __init__(
        self,
        opener: Callable[[], AbstractContextManager[Balancer]],
        settings: Settings,
        tasks: Sequence[Task] = (),
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.unready = STARTING
        self.thread: BalancerThread | None = None
        self._opener = opener
        self._settings = settings
        self._tasks = tasks
        self._on_ready = on_ready
        self._listeners: list[Listener] = []
        self._ending = asyncio.Event()
        self._reloading = asyncio.Event()
        self._tls = _tls(settings)
        self._wanted: Desired | None = None  # by the configuration file, as it was last read

    def stop(self) -> None:
        """Requests in progress are finished first. Call it in the thread of the event loop."""
        self._ending.set()

    def reload(self) -> None:
        """Read the configuration file and the certificate again."""
        self._reloading.set()

    async def run(self) -> None:
        """Runs until `stop`. Raises LbError if it cannot start."""
        self._wanted = config.read(self._settings.config) if self._settings.config else None
        async with AsyncExitStack() as stack:
            self.thread = thread = await stack.enter_async_context(BalancerThread.open(self._opener))
            access = AccessThread(lambda: Access.open(self._settings.access))
            stack.callback(access.close)
            self._listen(thread, access, stack)
            running = [asyncio.create_task(each.run_until_exit()) for each in self._listeners]
            background = asyncio.create_task(self._run_tasks(thread))
            await self._ending.wait()
            notify("STOPPING=1")
            thread.events.close()
            background.cancel()
            for listener in self._listeners:
                listener.should_exit = True
            await asyncio.gather(background, *running, return_exceptions=True)

    def _listen(self, thread: BalancerThread, access: AccessThread, stack: AsyncExitStack) -> None:
        """Accepts connections from here on; requests wait until the balancer is free."""
        features = FeatureThreads(self._settings.paths) if self._settings.paths else None
        if features:
            stack.callback(features.close)
        sessions, rejections = Sessions(), Rejections(thread.metrics.rejected)
        api = create_app(thread, lambda: self.unready, features, sessions)
        app = Measured(
            AccessMiddleware(api, access, sessions, rejections, self._settings.allowed_hosts), thread.metrics
        )
        local = unix_socket(self._settings.socket)
        stack.callback(self._settings.socket.unlink, missing_ok=True)
        self._listeners.append(Listener(app, [local], rejections))
        if self._tls:
            sockets = [tcp_socket(address, port) for address, port in self._settings.listen]
            self._listeners.append(Listener(app, sockets, rejections, self._tls))
        for listener in self._listeners:
            for each in listener.sockets:
                log.info("listening", address=_name(each))

    async def _run_tasks(self, thread: BalancerThread) -> None:
        await self._upgrade(thread)
        await self._reconcile(thread)
        self._on_ready()
        notify("READY=1")
        async with asyncio.TaskGroup() as group:
            group.create_task(self._reconcile_again(thread))
            group.create_task(self._reload_on_request(thread))
            group.create_task(feed_watchdog(thread))
            for task in self._tasks:
                group.create_task(_restarting(task, thread))

    async def _upgrade(self, thread: BalancerThread) -> None:
        """Once: what the verifier rejects now, it will reject again."""
        notes = await thread.upgrade()
        for note in notes:
            (log.error if thread.refused else log.info)(note)

    async def _reconcile(self, thread: BalancerThread) -> None:
        """Apply the store to the kernel, and the configuration file to the store."""
        try:
            _log_report("reconciled", (await thread.change(lambda balancer: balancer.repairs.reconcile())).report)
            if self._wanted is not None:
                await self._configure(thread, self._wanted, "configured")
            self.unready = ""
        except LbError as error:
            if self.unready != str(error):
                log.error("cannot apply the configuration to the kernel", reason=str(error), again_after_s=AGAIN_S)
            self.unready = str(error)

    async def _reconcile_again(self, thread: BalancerThread) -> None:
        """Until it succeeds."""
        while self.unready:
            await asyncio.sleep(AGAIN_S)
            await self._reconcile(thread)

    async def _reload_on_request(self, thread: BalancerThread) -> None:
        while True:
            await self._reloading.wait()
            self._reloading.clear()
            notify("RELOADING=1")
            await self._reload(thread)
            notify("READY=1")

    async def _reload(self, thread: BalancerThread) -> None:
        """Certificate and configuration: neither waits for the other to be right."""
        self._reload_certificate()
        if self._settings.config:
            try:
                self._wanted = config.read(self._settings.config)
                await self._configure(thread, self._wanted, "reloaded")
            except LbError as error:
                _refuse_config(thread, str(error))

    async def _configure(self, thread: BalancerThread, wanted: Desired, event: str) -> None:
        """Have the services of the configuration file served, unless that removes most of them."""

        def apply(balancer: Balancer) -> Report:
            merged = wanted.over(balancer.state.services)
            report = balancer.apply(merged.services)
            return replace(report, notes=(*merged.kept, *merged.overridden, *report.notes))

        try:
            report = (await thread.change(apply)).report
            for note in report.notes:
                log.info(note)
            _log_report(event, report)
            thread.set_config_fault("")
        except PruneRequired as error:
            file = self._settings.config
            _refuse_config(thread, f"{file}: would remove {error.loss}: to do so: xdp-lb apply --prune -f {file}")

    def _reload_certificate(self) -> None:
        certificate, key = self._settings.tls_certificate, self._settings.tls_key
        if self._tls and certificate and key:
            try:
                load_certificate(self._tls, certificate, key)
                log.info("certificate loaded", file=str(certificate))
            except LbError as error:
                log.error("certificate reload failed: the previous one stays in use", reason=str(error))


def _tls(settings: Settings) -> ssl.SSLContext | None:
    if settings.tls_certificate and settings.tls_key and settings.listen:
        return tls_context(settings.tls_certificate, settings.tls_key)
    return None


def _refuse_config(thread: BalancerThread, fault: str) -> None:
    thread.set_config_fault(fault)
    log.error("reload failed: configuration unchanged", reason=fault)


def _log_report(event: str, report: Report) -> None:
    for warning in report.warnings:
        log.warning(warning)
    log.info(event, changes=len(report.changes), attached=[a.interface for a in report.attached])


def _name(listening: socket.socket) -> str:
    name = listening.getsockname()
    return name if isinstance(name, str) else f"{name[0]} port {name[1]}"


async def _restarting(task: Task, thread: BalancerThread) -> None:
    while True:
        try:
            await task.run(thread)
            return
        except Exception:
            log.exception("task failed: restarting", task=type(task).__name__, after_s=AGAIN_S)
        await asyncio.sleep(AGAIN_S)


def serve(
    opener: Callable[[], AbstractContextManager[Balancer]], settings: Settings, tasks: Sequence[Task] = ()
) -> None:
    """Run the daemon until SIGTERM or SIGINT; SIGHUP reloads. Raises LbError."""
    gc.enable()  # the command line disables it
    _raise_limit()
    asyncio.run(_serve(opener, settings, tasks))


async def _serve(
    opener: Callable[[], AbstractContextManager[Balancer]], settings: Settings, tasks: Sequence[Task]
) -> None:
    daemon = Daemon(opener, settings, tasks, on_ready=_ready)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.stop)
    loop.add_signal_handler(signal.SIGHUP, daemon.reload)
    await daemon.run()
    log.info("stopped: programs and maps stay loaded")


def _ready() -> None:
    """Exempt what is loaded by now from garbage collection, which would take longer than most changes."""
    gc.collect()
    gc.freeze()
    log.info("ready")


def _raise_limit() -> None:
    """Raise the limit of open files to the hard limit: each connection is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
