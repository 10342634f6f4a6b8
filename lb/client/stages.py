"""Users' stages by the API: the functions of lb.stages.lifecycle that do not run one, over a daemon.

Enters: numbers. Leaves: the documents of `xdp-lb stage list --json` and of `xdp-lb stage tables --json`. A stage is
compiled and run by `xdp-lb stage run` alone, on the host itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from lb.client.http import DaemonHttp
from lb.formats.documents import Document


class StageClient:
    def __init__(self, http: DaemonHttp) -> None:
        self._http = http

    def listed(self) -> list[Document]:
        return self._http.ask("GET", "/v1/stages", list[Document]).value

    def tables(self, number: int) -> list[Document]:
        """What it has found up to now."""
        return self._http.ask("GET", f"/v1/stages/{number}/tables", list[Document]).value

    def stop(self, numbers: Sequence[int] = ()) -> list[Document]:
        """These, or (none) all. They are those of `listed`, as they were."""
        return self._http.ask("DELETE", "/v1/stages", list[Document], query={"number": list(numbers)}).value
