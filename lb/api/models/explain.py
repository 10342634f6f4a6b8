"""Bodies and answers of `/explain`."""

from __future__ import annotations

import binascii
from base64 import b64decode
from typing import Annotated, Any, Literal

from pydantic import Field

from lb.api.models.common import LARGEST, Answer, Body, Count
from lb.errors import InvalidInput
from lb.explain.packet import Flow, check_size, parse_flags, parse_flow, parse_hex
from lb.formats.problems import Pointer


class ExplainBody(Body):
    """One of: `protocol` with `source` and `destination`; `hex`; `pcap`."""

    protocol: Literal["tcp", "udp", "icmp"] | None = None
    source: str | None = Field(None, examples=["192.0.2.7:40000"])
    destination: str | None = Field(None, examples=["10.0.0.100:443"])
    syn: bool = Field(False, description="The first packet of a TCP connection")
    flags: str | None = Field(None, description="TCP flags out of F S R P A U E W; default: A", examples=["S"])
    hex: str | None = Field(None, description="An Ethernet frame")
    length: Count | None = Field(None, description="Original length of a truncated frame")
    pcap: str | None = Field(None, description="A capture file, in base64")
    number: Annotated[int, Field(ge=1, le=LARGEST)] | None = Field(None, description="Number of the packet in pcap")
    interface: str | None = Field(None, description="Ingress interface; default: that of the route to the sender")

    def check(self) -> None:
        """That it says one thing. Raises Problem."""
        if [self.protocol, self.hex, self.pcap].count(None) != 2:
            raise InvalidInput("packet missing: give one of protocol with source and destination, hex, pcap")
        for name, goes_with in (("length", self.hex), ("number", self.pcap)):
            with Pointer() / name:
                if getattr(self, name) is not None and goes_with is None:
                    raise InvalidInput(f"{name}: requires {'hex' if name == 'length' else 'pcap'}")
        with Pointer() / ("flags" if self.flags is not None else "syn"):
            if (self.syn or self.flags is not None) and self.protocol != "tcp":
                raise InvalidInput("syn and flags require protocol tcp")
            if self.syn and self.flags is not None:
                raise InvalidInput("syn and flags are mutually exclusive")

    def flow(self) -> tuple[Flow, int]:
        """And its TCP flags."""
        for name in ("source", "destination"):
            with Pointer() / name:
                if getattr(self, name) is None:
                    raise InvalidInput(f"{name}: missing")
        with Pointer() / "flags":
            letters = "S" if self.syn else "A" if self.flags is None else self.flags
            bits = parse_flags(letters) if self.protocol == "tcp" else 0
        return parse_flow(str(self.protocol), self.source or "", self.destination or ""), bits

    def frame(self) -> bytes:
        with Pointer() / "hex":
            return check_size(parse_hex(self.hex or ""))


def pcap_bytes(text: str) -> bytes:
    """Raises Problem."""
    with Pointer() / "pcap":
        try:
            return b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidInput(f"pcap: not base64: {error}") from None


class FrameAnswer(Answer):
    bytes: int
    headers: list[str]
    hex: str


class ExplanationAnswer(Answer):
    """See xdp-lb explain --help."""

    interface: str
    packet: FrameAnswer
    action: str
    reason: str | None
    verdict: str
    fix: str | None
    ended_by: list[dict[str, Any]]
    service: dict[str, Any] | None
    slot: dict[str, Any] | None
    source: str | None
    affinity: bool
    member: dict[str, Any] | None
    reply_to: str | None
    egress: str | None
    out: FrameAnswer | None
    disagreement: str | None
    notes: list[str]
