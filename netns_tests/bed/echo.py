"""A UDP echo: `python -m netns_tests.bed.echo NAME PORT` answers each datagram with NAME, a space, and what it held.

It imports nothing of the bed, since it is started for many a test.
"""

from __future__ import annotations

import socket
import sys


def echo_udp(name: str, port: int) -> None:
    """Echo datagrams until killed, each from the address it was sent to (RFC 3542, section 6).

    Under direct return that is the VIP on the loopback, which the kernel would not choose itself.
    """
    server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    server.bind(("::", port))
    print("ready", flush=True)
    while True:
        payload, (packet_info, *_), _, client = server.recvmsg(65535, socket.CMSG_SPACE(20))
        level, kind, info = packet_info
        # Interface 0: the route decides where the answer leaves.
        source = (level, kind, info[:16] + bytes(4))
        server.sendmsg([f"{name} ".encode() + payload], [source], 0, client)


def main() -> None:
    echo_udp(sys.argv[1], int(sys.argv[2]))


if __name__ == "__main__":
    main()
