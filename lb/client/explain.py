"""Explanations by the API: the methods of lb.explain.request.ExplainService, over a daemon.

Enters: flows, frames, capture files. Leaves: the documents of `xdp-lb explain --json`.
"""

from __future__ import annotations

from base64 import b64encode
from socket import IPPROTO_TCP, IPPROTO_UDP
from typing import Any

from lb.client.http import DaemonHttp
from lb.explain.packet import Flow, flag_letters
from lb.formats.documents import Document
from lb.model.vip import join_port

NAMES = {IPPROTO_TCP: "tcp", IPPROTO_UDP: "udp"}


class ExplainClient:
    def __init__(self, http: DaemonHttp) -> None:
        self._http = http

    def flow(self, flow: Flow, tcp_flags: int = 0, interface: str | None = None) -> Document:
        name = NAMES.get(flow.protocol, "icmp")
        ends = (flow.source, flow.source_port), (flow.destination, flow.destination_port)
        source, destination = (str(end[0]) if name == "icmp" else join_port(*end) for end in ends)
        flags = {"flags": flag_letters(tcp_flags)} if name == "tcp" else {}
        words = {"protocol": name, "source": source, "destination": destination, **flags}
        return self._ask({**words, "interface": interface})[0]

    def frame(self, frame: bytes, interface: str | None = None, *, length: int | None = None) -> Document:
        return self._ask({"hex": frame.hex(), "length": length, "interface": interface})[0]

    def capture(self, pcap: bytes, number: int | None = None, interface: str | None = None) -> list[Document]:
        """Of the packets of a capture file, or the one of that number."""
        return self._ask({"pcap": b64encode(pcap).decode(), "number": number, "interface": interface})

    def _ask(self, body: dict[str, Any]) -> list[Document]:
        given = {key: value for key, value in body.items() if value is not None}
        return self._http.ask("POST", "/v1/explain", list[Document], body=given).value
