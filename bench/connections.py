"""TCP connections as fast as they can be opened and ended: a client and a server, for bench live.

A connection counts when the server's one byte has come back, so that a proxy in between cannot answer for it. The
server then closes, and the client resets: no connection lingers in TIME_WAIT to use up the ports.

    python -m bench.connections PORT     serves until it is ended
"""

from __future__ import annotations

import errno
import select
import socket
import struct
import sys
import time
from dataclasses import dataclass, field
from itertools import takewhile

GREETING = b"."
BACKLOG = 4096
RESET_AT_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER, socket(7)
PATIENCE_S = 1.0  # a connection that takes longer has failed


def serve(port: int) -> None:
    """On all addresses; returns never."""
    with socket.create_server(("0.0.0.0", port), backlog=BACKLOG) as server:
        while True:
            connection, _ = server.accept()
            with connection:
                greet(connection)


def greet(connection: socket.socket) -> None:
    try:
        connection.send(GREETING)
    except OSError as error:  # the client has given it up
        if error.errno not in (errno.ECONNRESET, errno.EPIPE):
            raise


@dataclass
class Client:
    """Keeps `at_once` connections in the making, in the network namespace of the thread that calls `run`."""

    address: tuple[str, int]
    at_once: int
    done: int = 0
    failed: int = 0
    _started: dict[int, tuple[socket.socket, float]] = field(default_factory=dict)
    _poll: select.epoll = field(default_factory=select.epoll)

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            while len(self._started) < self.at_once:
                self._start(now)
            for number, _ in self._poll.poll(0.1):
                self._finish(number)
            self.failed += self._give_up(now - PATIENCE_S)
        self._give_up(end)

    def _start(self, now: float) -> None:
        connection = socket.socket()
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
        connection.connect_ex(self.address)
        self._poll.register(connection, select.EPOLLIN)
        self._started[connection.fileno()] = connection, now

    def _finish(self, number: int) -> None:
        connection, _ = self._started.pop(number)
        with connection:
            try:
                greeted = connection.recv(1) == GREETING
            except OSError:
                greeted = False
        self.done += greeted
        self.failed += not greeted

    def _give_up(self, latest_start: float) -> int:
        """Ends what is in the making since before then: the first ones, in the order of their start."""
        late = list(takewhile(lambda started: started[1] <= latest_start, self._started.values()))
        for connection, _ in late:
            del self._started[connection.fileno()]
            connection.close()
        return len(late)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
