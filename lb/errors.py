"""The errors of the balancer. Each message names the thing and what to do; the command line prints it as one line.

LbError
├── InvalidInput       the words given do not describe a service, backend or file
├── NotFound           the named thing is not in the desired state
├── AlreadyExists      the named thing already exists
├── StoreError         the desired state cannot be read or written
├── Busy               another xdp-lb is changing this network namespace
├── NoRoute            the host has no way to a backend that the mode can use
├── DataplaneError     the kernel refused; the old state is in force
├── Conflict           the thing is no longer as it was when it was read
├── PruneRequired      a configuration would remove more than half of what is served
└── DaemonError        the daemon does not answer, or refuses to
"""

from collections.abc import Iterator
from contextlib import contextmanager


class LbError(Exception):
    """Base of everything this package raises on purpose."""


class InvalidInput(LbError):
    """`part`: where the value at fault is in what was given, by keys and positions, as far as that is known."""

    part: tuple[str | int, ...] = ()


@contextmanager
def part(*steps: str | int) -> Iterator[None]:
    """What is found to be invalid in here is so at these steps."""
    try:
        yield
    except InvalidInput as error:
        error.part = (*steps, *error.part)
        raise


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


class PruneRequired(LbError):
    """`loss`: what would be removed, in words."""

    def __init__(self, message: str, loss: str = "") -> None:
        super().__init__(message)
        self.loss = loss


class DaemonError(LbError):
    pass
