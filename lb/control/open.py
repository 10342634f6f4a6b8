"""Puts a balancer together: the store, the kernel's dataplane, the host's network, filter rules, health."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from lb.control.balancer import Balancer
from lb.control.filter_handover import KernelFilterHandover
from lb.health.file import HealthFile
from lb.host.capabilities import check_may_change
from lb.paths import Paths
from lb.store.lock import writer_lock
from lb.store.store import Store


@contextmanager
def open_balancer(paths: Paths, *, write: bool = True, in_daemon: bool = False) -> Iterator[Balancer]:
    """The balancer of one network namespace; to `write` is to hold its lock until the end. `in_daemon`: see Balancer.

    Raises Busy, StoreError, DataplaneError.
    """
    from lb.dataplane.dataplane import KernelDataplane  # what needs no kernel does without it
    from lb.host.neighbours import ANSWER_TIMEOUT_S, FOLLOWED_TIMEOUT_S
    from lb.host.neighbours import Network as KernelNetwork

    with ExitStack() as stack:
        if write:
            check_may_change()
            stack.enter_context(writer_lock(paths.lock, paths.netns))
        store = stack.enter_context(Store.open(paths.store, write))
        dataplane = KernelDataplane.open(paths)
        stack.callback(dataplane.close)
        handover = KernelFilterHandover(paths, store, dataplane.programs)
        timeout_s = FOLLOWED_TIMEOUT_S if in_daemon else ANSWER_TIMEOUT_S
        network = KernelNetwork(answer_timeout_s=timeout_s, in_daemon=in_daemon)
        conditions = HealthFile(paths.health).conditions(store.load().services)
        yield Balancer(store, dataplane, network, paths.netns, handover, in_daemon=in_daemon, conditions=conditions)
