"""The one place that opens an rtnetlink socket, and the edge where its errors become ours.

Enters: nothing but the current network namespace. Leaves: `route_socket()`, a pyroute2 IPRoute that
reports the kernel's own words for a refusal (extended acks), and `translate()`, which makes an
XdpError of a NetlinkError.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec
from typing import Any

from xdp.errors import AttachError, NoSuchInterface, NotPermitted, NotSupported, XdpError


@contextmanager
def _deferred_init(package: str) -> Iterator[None]:
    """Import submodules of `package` within, and leave its own `__init__` for whoever needs it.

    pyroute2's `__init__` imports every protocol it knows and a database of the network: a third of
    what a command pays that wants one rtnetlink socket. So the package enters sys.modules without
    having run; the first attribute it lacks (as in `from pyroute2 import NDB`) runs its `__init__`
    in place, with the submodules imported so far bound to it already.
    """
    spec = None if package in sys.modules else find_spec(package)
    if spec is None or spec.loader is None:
        yield
        return
    module, loader = module_from_spec(spec), spec.loader
    sys.modules[package] = module
    try:
        yield
    except BaseException:
        del sys.modules[package]
        raise

    def run_init(attribute: str) -> Any:
        del module.__dict__["__getattr__"]
        loader.exec_module(module)
        return getattr(module, attribute)

    module.__dict__["__getattr__"] = run_init


with _deferred_init("pyroute2"):
    from pyroute2.iproute.linux import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

__all__ = ["IPRoute", "NetlinkError", "reason", "route_socket", "translate"]

_NOT_PERMITTED = "not permitted: run as root, or with CAP_NET_ADMIN and CAP_BPF"

_ERRORS: dict[int, type[XdpError]] = {
    errno.ENODEV: NoSuchInterface,
    errno.EPERM: NotPermitted,
    errno.EACCES: NotPermitted,
    errno.EOPNOTSUPP: NotSupported,
}


def route_socket() -> IPRoute:
    """An rtnetlink socket in the calling thread's network namespace, subscribed to no events.

    The caller closes it (`with`). Requests raise NetlinkError.
    """
    return IPRoute(ext_ack=True, groups=0)


def reason(error: NetlinkError) -> str:
    """The kernel's own sentence (its extended ack), else the words for the error number."""
    return str(error.args[1])


def translate(error: NetlinkError, subject: str) -> XdpError:
    """The fitting XdpError for the caller to raise: `subject: reason`."""
    kind = _ERRORS.get(error.code, AttachError)
    return kind(f"{subject}: {_NOT_PERMITTED if kind is NotPermitted else reason(error)}")
