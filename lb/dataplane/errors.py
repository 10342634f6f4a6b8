"""The edge where errors of the packages below become the balancer's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from errno import EMFILE, ENFILE

from filters.errors import FilterError
from lb.errors import DataplaneError, InvalidInput
from xdp.errors import XdpError

MORE_DESCRIPTORS = "raise the limit of open files: ulimit -n, or LimitNOFILE= of the unit"


def lacks_descriptors(error: BaseException | None) -> bool:
    """Or what it was raised from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (EMFILE, ENFILE):
            return True
        error = error.__cause__
    return False


@contextmanager
def translated() -> Iterator[None]:
    """For a block, or as a decorator."""
    try:
        yield
    except FilterError as error:
        raise InvalidInput(str(error)) from error
    except XdpError as error:
        more = f": {MORE_DESCRIPTORS}" if lacks_descriptors(error) else ""
        raise DataplaneError(f"{error}{more}") from error
