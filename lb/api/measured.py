"""ASGI middleware that times requests and counts responses."""

from __future__ import annotations

import time
from typing import Any

from lb.api.middleware import App, Message, Receive, Send
from lb.runtime.metrics import DaemonMetrics

NO_ROUTE = "none"  # paths of the clients' own making are no labels


class Measured:
    """An ASGI application around another: what it takes to answer."""

    def __init__(self, app: App, metrics: DaemonMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", NO_ROUTE)
                self._metrics.answered(scope["method"], route, message["status"], time.perf_counter() - start)
            await send(message)

        await self._app(scope, receive, noting)
