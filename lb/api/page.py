"""The web page at `/`: the files of lb/api/web, as they are.

Enters: a path; no authentication, since the page reads everything from the API with a token. Leaves: a file with its
entity tag, and headers that restrict scripts to these files and forbid framing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

FOLDER = Path(__file__).with_name("web")
INDEX = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # cached, but revalidated: an upgrade is seen at once
}


@dataclass(frozen=True, slots=True)
class Asset:
    body: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> Asset:
        body = path.read_bytes()
        return cls(body, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def _path(name: str) -> str:
    return "/" if name == INDEX else f"/assets/{name}"


ASSETS = {_path(each.name): Asset.read(each) for each in FOLDER.iterdir() if each.suffix in MEDIA_TYPES}


async def _serve(request: Request) -> Response:
    asset = ASSETS[request.scope["path"]]
    headers = {**HEADERS, "ETag": asset.etag}
    if asset.etag in request.headers.get("If-None-Match", ""):
        return Response(status_code=304, headers=headers)
    return Response(asset.body, media_type=asset.media_type, headers=headers)


router = APIRouter(include_in_schema=False)
for path in ASSETS:
    router.add_api_route(path, _serve, methods=["GET", "HEAD"])
