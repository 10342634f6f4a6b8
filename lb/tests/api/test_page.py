"""The files of the web page as they are served: to anybody, and with nothing in them that is anybody else's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lb.api import page
from lb.api.access import Access, Role
from lb.tests.cli.test_cli import RING, Host
from lb.tests.daemon.test_server import Certificate, Remote, serving_tcp

SVG_NAMESPACE = "http://www.w3.org/2000/svg"


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    directory = tmp_path_factory.mktemp("page")
    host = Host(directory / "default" / "state.db")
    host.lines("attach", "eth0", "--backends", "10.0.0.11", *RING)
    with serving_tcp(host, directory, Certificate(directory)) as made:
        yield made


@pytest.fixture(scope="module")
def anybody(remote: Remote) -> Iterator[httpx.Client]:
    with remote.http() as http:
        yield http


@pytest.mark.parametrize("path", page.ASSETS)
def test_anybody_gets_the_page_which_has_no_data(anybody: httpx.Client, path: str) -> None:
    answer = anybody.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == page.MEDIA_TYPES[Path(path).suffix or ".html"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in answer.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert "10.0.0.1" not in answer.text
    head = anybody.head(path)
    assert (head.status_code, head.headers["etag"], head.content) == (200, answer.headers["etag"], b"")


def test_what_the_browser_has_is_not_sent_again(anybody: httpx.Client) -> None:
    etag = anybody.get("/").headers["etag"]
    for known in (etag, f'W/{etag}, "other"'):
        again = anybody.get("/", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert anybody.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/assets/", "/assets/nothing.js", "/assets/../v1/status", "/assets/%2e%2e/page.py", "/index.html", "//"]
)
def test_nothing_else_is_to_be_had(anybody: httpx.Client, path: str) -> None:
    asked = anybody.build_request("GET", "/", extensions={"target": path.encode()})  # as it is, dots and all
    assert anybody.send(asked).status_code == 401


def test_who_sends_something_to_the_page_is_refused_and_not_recorded(remote: Remote, anybody: httpx.Client) -> None:
    """Else anybody could fill the audit log, whose oldest entries go."""
    for path in ("/", "/assets/app.js", "/healthz", "/readyz"):
        assert anybody.post(path, json={}).status_code == 401
    with Access.open(remote.running.settings.access) as access:
        assert access.entries(10) == []


@pytest.mark.parametrize("role", Role)
def test_the_page_is_told_who_has_logged_in(remote: Remote, role: Role) -> None:
    with remote.http(remote.tokens[role]) as http:
        assert http.get("/v1/whoami").json() == {"who": f"token {role}", "role": str(role)}
    with remote.http() as http:
        assert http.get("/v1/whoami").status_code == 401


def test_the_page_names_nothing_outside() -> None:
    for path, asset in page.ASSETS.items():
        text = asset.body.decode().replace(SVG_NAMESPACE, "")
        assert not re.search(r"https?://|[\"'`(]//|@import|url\(", text), path


def test_all_that_the_page_names_is_there_and_used() -> None:
    named = set()
    for asset in page.ASSETS.values():
        named |= set(re.findall(r'(?:href|src)="(/[^"]+)"', asset.body.decode()))
        named |= {f"/assets/{name}" for name in re.findall(r'from "\./([^"]+)"', asset.body.decode())}
    assert named | {"/"} == set(page.ASSETS)


def test_no_style_or_script_is_in_the_document_itself() -> None:
    """The policy would keep it from working."""
    index = page.ASSETS["/"].body.decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)", index)


def test_every_file_of_the_folder_is_served() -> None:
    assert {each.name for each in page.FOLDER.iterdir()} == {Path(path).name or page.INDEX for path in page.ASSETS}
