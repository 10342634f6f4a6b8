"""The edge where errors of the packages below become the balancer's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from filters.errors import FilterError
from lb.errors import DataplaneError, InvalidInput
from xdp.errors import XdpError


@contextmanager
def translated() -> Iterator[None]:
    """For a block, or as a decorator."""
    try:
        yield
    except FilterError as error:
        raise InvalidInput(str(error)) from error
    except XdpError as error:
        raise DataplaneError(str(error)) from error
