"""What is asked to be explained -> documents, by the program of this host or by a daemon.

Enters: a flow, a frame, or the packets of a capture file. Leaves: a document for each, made by an ExplainService: the
one that has the program at hand is LocalExplainer, the other is lb.client.explain.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from lb.errors import InvalidInput
from lb.explain.packet import Flow
from lb.formats.documents import Document

if TYPE_CHECKING:
    from lb.explain.explainer import Explainer
    from lb.formats.capture_file import Capture


class ExplainService(Protocol):
    """Raises LbError."""

    def flow(self, flow: Flow, tcp_flags: int = 0, interface: str | None = None) -> Document:
        """A packet of this flow, as it would come in."""
        ...

    def frame(self, frame: bytes, interface: str | None = None, *, length: int | None = None) -> Document:
        """An Ethernet frame, as it is. `length`: what it had before it was cut."""
        ...


class LocalExplainer:
    """See ExplainService, for the program that this process can reach."""

    def __init__(self, explainer: Explainer) -> None:
        self._explainer = explainer

    def flow(self, flow: Flow, tcp_flags: int = 0, interface: str | None = None) -> Document:
        from lb.explain.documents import document

        return document(self._explainer.flow(flow, tcp_flags, interface))

    def frame(self, frame: bytes, interface: str | None = None, *, length: int | None = None) -> Document:
        from lb.explain.documents import document

        return document(self._explainer.frame(frame, interface, _cut(len(frame), length)))


def _cut(captured: int, length: int | None) -> tuple[str, ...]:
    if length in (None, captured):
        return ()
    return (f"only {captured} of {length} bytes were captured: the result is for the truncated packet",)


def explain_capture(
    asked: ExplainService, capture: Capture, number: int | None = None, interface: str | None = None
) -> Iterator[Document]:
    """Of all its packets, or the one of that number, counted from 1. Raises InvalidInput where there is none."""
    found = 0
    for found, packet in enumerate(capture.packets(), 1):
        if number in (None, found):
            yield asked.frame(packet.data, interface, length=packet.length)
        if number == found:
            return
    if number:
        raise InvalidInput(f"{capture.name}: no packet {number}: the file has {found}")
