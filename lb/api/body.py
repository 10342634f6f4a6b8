"""Bodies that may be large, off the event loop: read from JSON and checked in a thread of their own, one at a time.

Enters: the bytes of a request body. Leaves: values, or a Problem. A call into C holds the interpreter's lock until it
returns, so the event loop waits for it from any thread: documents are read and checked object by object.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute

from lb.formats.problems import Problem

T = TypeVar("T")

LARGEST_ITEMS = 200_000  # values of a JSON body: one of 1 MiB has a third of that
LARGEST_LOCAL_ITEMS = 2_000_000  # a hundred thousand backends are 800,000
SMALL = 64 << 10  # bytes that are not worth a thread
STARTS_OF_VALUES = b"{[,"

_thread = ThreadPoolExecutor(1, thread_name_prefix="bodies")


def check_items(body: bytes, largest: int) -> None:
    """An upper bound of the values, from their separators, since a value takes a hundred times its bytes in memory.
    Raises Problem."""
    if len(body) > largest and len(body) - len(body.translate(None, STARTS_OF_VALUES)) > largest:
        raise Problem(413, f"request body has more than {largest} values: send fewer at a time")


async def off_the_loop(work: Callable[[], T]) -> T:
    """Raises what the work raises."""
    return await asyncio.get_running_loop().run_in_executor(_thread, work)


class _Request(Request):
    async def json(self) -> Any:
        body = await self.body()
        if len(body) <= SMALL:
            return json.loads(body)
        return await off_the_loop(lambda: json.loads(body, object_hook=_give_way))


def _give_way(document: dict[str, Any]) -> dict[str, Any]:
    """In Python, where the interpreter lets other threads go on."""
    return document


class LargeBodyRoute(APIRoute):
    """A route whose body is read off the event loop."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_large(request: Request) -> Response:
            return await handle(_Request(request.scope, request.receive))

        return handle_large
