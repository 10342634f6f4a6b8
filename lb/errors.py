"""The errors of the balancer. Each message names the thing and what to do; the command line prints it as one line.

LbError
├── InvalidInput       the words given do not describe a service, backend or file
├── NotFound           the named thing is not in the desired state
├── AlreadyExists      the named thing is there already
├── StoreError         the desired state cannot be read or written
├── Busy               another xdp-lb is changing this network namespace
├── NoRoute            the host has no way to a backend that the mode can use
├── DataplaneError     the kernel refused; the old state is in force
├── Conflict           the thing is no longer as it was when it was read
└── DaemonError        the daemon does not answer, or refuses to
"""


class LbError(Exception):
    """Base of everything this package raises on purpose."""


class InvalidInput(LbError):
    pass


class NotFound(LbError):
    pass


class AlreadyExists(LbError):
    pass


class StoreError(LbError):
    pass


class Busy(LbError):
    pass


class NoRoute(LbError):
    pass


class DataplaneError(LbError):
    pass


class Conflict(LbError):
    pass


class DaemonError(LbError):
    pass
