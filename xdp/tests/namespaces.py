"""Network namespaces that tests run in, with nothing in them but what the test puts there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from pyroute2 import netns

from xdp.netlink import IPRoute, route_socket

NEAR, FAR = "near", "far"


@contextmanager
def own_namespace(word: str) -> Iterator[IPRoute]:
    """This process is in it until the end. `word` tells it from those of other tests of the process."""
    name = f"{word}-{os.getpid()}"
    with ExitStack() as cleanup:
        netns.create(name)
        cleanup.callback(netns.remove, name)
        netns.pushns(name)
        cleanup.callback(netns.popns)
        yield cleanup.enter_context(route_socket())


@contextmanager
def namespace_with_veth(word: str, mtu: int = 1500) -> Iterator[IPRoute]:
    """NEAR and FAR, both up."""
    with own_namespace(word) as ipr:
        ipr.link("add", ifname=NEAR, kind="veth", mtu=mtu, peer={"ifname": FAR, "mtu": mtu})
        for end in (NEAR, FAR):
            ipr.link("set", index=ipr.link_lookup(ifname=end)[0], state="up")
        yield ipr
