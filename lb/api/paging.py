"""Long lists in pages: `?limit=100&offset=200`, with a link to the next one (RFC 8288).

Lists are in the order of their VIPs and addresses, so that pages of an unchanged list make up the whole. The entity tag
is that of the whole list: it tells whether it has changed between two pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

from fastapi import Depends, Query, Response

from lb.api.models.common import LARGEST

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page:
    limit: int
    offset: int

    def of(self, every: Sequence[T]) -> Sequence[T]:
        return every[self.offset : self.offset + self.limit]

    def link(self, response: Response, total: int) -> Response:
        """Name the page that follows, if there is one."""
        following = self.offset + self.limit
        if following < total:
            response.headers["Link"] = f'<?limit={self.limit}&offset={following}>; rel="next"'
        return response


async def _page(
    limit: Annotated[int | None, Query(ge=1, le=LARGEST, description="At most so many; default: all")] = None,
    offset: Annotated[int, Query(ge=0, le=LARGEST, description="Skip so many")] = 0,
) -> Page:
    return Page(limit or LARGEST, offset)


ThePage = Annotated[Page, Depends(_page)]
