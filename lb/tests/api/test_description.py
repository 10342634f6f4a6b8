"""/openapi.json: complete for those who make a client from it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import pytest

from lb.api.app import create_app
from lb.api.description import FIELDS, TAGS
from lb.runtime.balancer_thread import BalancerThread
from lb.runtime.features import FeatureThreads


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    app = create_app(cast(BalancerThread, None), lambda: "", cast(FeatureThreads, object()))
    assert app.openapi() == app.openapi()
    return app.openapi()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method} {path}", operation


def fields(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for schema, about in document["components"]["schemas"].items():
        for field, described in about.get("properties", {}).items():
            yield schema, field, described


def test_every_field_has_a_description_and_an_example(document: dict[str, Any]) -> None:
    lacking = [f"{schema}.{field}" for schema, field, about in fields(document) if not about.get("description")]
    assert lacking == []
    assert [f"{schema}.{field}" for schema, field, about in fields(document) if "examples" not in about] == []


def test_nothing_is_described_that_is_not_there(document: dict[str, Any]) -> None:
    there = {name for schema, field, _ in fields(document) for name in (field, f"{schema}.{field}")}
    assert FIELDS.keys() - there == set()


def test_operations_have_short_names_of_their_own_and_one_tag(document: dict[str, Any]) -> None:
    names = Counter(operation["operationId"] for _, operation in operations(document))
    assert set(names.values()) == {1}
    assert [name for name in names if not re.fullmatch(r"[a-z]+(_[a-z]+)?", name)] == []
    for label, operation in operations(document):
        assert len(operation["tags"]) == 1, label
    assert {tag for _, operation in operations(document) for tag in operation["tags"]} == set(TAGS)


def test_every_parameter_is_described(document: dict[str, Any]) -> None:
    for label, operation in operations(document):
        for parameter in operation.get("parameters", ()):
            assert parameter["description"], (label, parameter["name"])


def test_what_needs_a_token_says_so(document: dict[str, Any]) -> None:
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    free = {label for label, operation in operations(document) if operation["security"] == []}
    assert free == {"get /healthz", "get /readyz", "post /v1/sessions"}
