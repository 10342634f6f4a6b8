"""Users' stages as commands reach them: of this host, or through the daemon where it runs.

Enters: the paths of this network namespace. Leaves: documents. A stage is run by the process of `xdp-lb stage run`
itself: C of a user's own, and the 128 MB that its compiler takes, have no business in the daemon.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from lb.client.balancer import daemon_listens
from lb.formats.documents import Document
from lb.paths import Paths


class Stages(Protocol):
    """Raises LbError."""

    def listed(self) -> list[Document]: ...

    def tables(self, number: int) -> list[Document]: ...

    def stop(self, numbers: Sequence[int] = ()) -> list[Document]:
        """These, or (none) all."""
        ...


class Here:
    """See Stages; by way of lb.stages.lifecycle."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths

    def listed(self) -> list[Document]:
        from lb.stages.lifecycle import listed, record_document

        return [record_document(*each) for each in listed(self._paths)]

    def tables(self, number: int) -> list[Document]:
        from lb.stages.lifecycle import tables

        return tables(self._paths, number)

    def stop(self, numbers: Sequence[int] = ()) -> list[Document]:
        from lb.stages.lifecycle import record_document, stop

        return [record_document(*each) for each in stop(self._paths, numbers)]


@contextmanager
def open_stages(paths: Paths) -> Iterator[Stages]:
    """The daemon, where it runs."""
    if not daemon_listens(paths.socket):
        yield Here(paths)
        return
    from lb.client.client import Client

    with Client.unix(paths.socket) as client:
        yield client.stages
