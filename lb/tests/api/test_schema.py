"""Requests made from the API's own description: no answer is an internal error, or one that it does not describe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import booleans
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lb.api.access import Role
from lb.api.app import create_app
from lb.runtime.balancer_thread import BalancerThread
from lb.tests.fakes.host import RING, Host
from lb.tests.fakes.tls import Certificate, Remote, serving_tcp

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 12  # of each operation
THERE = {"vip": "10.0.0.1:80/tcp", "backend": "10.0.0.11:80"}  # until a request takes them away


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    directory = tmp_path_factory.mktemp("schema")
    host = Host(directory / "default" / "state.db")
    assert host.run("attach", "eth0", "--backends", "10.0.0.11,10.0.0.12", *RING).exit_code == 0
    with serving_tcp(host, directory, Certificate(directory)) as made:
        yield made


def operations() -> dict[str, Any]:
    """By method and path. Events are left out: they have no end, and hypothesis no patience."""
    schema = schemathesis.openapi.from_dict(create_app(cast(BalancerThread, None), lambda: "").openapi())
    found: list[Any] = [each.ok() for each in schema.exclude(path="/v1/events").get_all_operations()]  # type: ignore[union-attr]
    return {operation.label: operation for operation in found}


OPERATIONS = operations()


# What only reads takes nothing that could be wrong, and neither does this.
WITHOUT_INPUT = "POST /v1/session-codes"
MODES = [
    (label, mode)
    for label in OPERATIONS
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    if mode is GenerationMode.POSITIVE or not label.startswith(("GET", WITHOUT_INPUT))
]


@pytest.mark.parametrize(("label", "mode"), MODES)
def test_every_answer_is_one_that_is_described(label: str, mode: GenerationMode, remote: Remote) -> None:
    token = {"Authorization": f"Bearer {remote.tokens[Role.WRITE]}"}
    certificate = str(remote.certificate.certificate)

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=OPERATIONS[label].as_strategy(generation_mode=mode), is_there=booleans())
    def check(case: Any, is_there: bool) -> None:
        if is_there:
            case.path_parameters = {**(case.path_parameters or {}), **THERE}
        case.call_and_validate(base_url=remote.url, headers=token, verify=certificate, checks=CHECKS)

    check()


def test_the_daemon_is_well_after_all_of_it(remote: Remote) -> None:
    with remote.http(remote.tokens[Role.WRITE]) as http:
        body = {"services": [{"vip": "10.0.0.1:80", "ring_size": 251, "backends": [{"backend": "10.0.0.11"}]}]}
        assert http.put("/v1/config", json=body).status_code == 200
        assert [s["vip"] for s in http.get("/v1/services").json()] == ["10.0.0.1:80/tcp"]
    assert "error" not in {line["log_level"] for line in remote.running.said}
