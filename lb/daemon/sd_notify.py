"""sd_notify(3): readiness, and the watchdog."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress

from lb.runtime.balancer_thread import BalancerThread


def notify(message: str) -> None:
    """Send to the service manager, if any."""
    name = os.environ.get("NOTIFY_SOCKET")
    if not name:
        return
    address = "\0" + name[1:] if name.startswith("@") else name
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager, suppress(OSError):
        manager.sendto(message.encode(), address)


async def feed_watchdog(thread: BalancerThread) -> None:
    """The daemon is alive while both the event loop and the balancer's thread get on."""
    period_us = os.environ.get("WATCHDOG_USEC", "")
    if not period_us.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        await thread.call(lambda balancer: None)
        notify("WATCHDOG=1")
        await asyncio.sleep(int(period_us) / 2e6)
