"""What the daemon says, for people and for programs, and what it keeps to itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from lb.daemon import logs


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


SECRET = "xlb_0123456789"


def fail(secret: str) -> None:
    raise ZeroDivisionError(f"with {len(secret)} characters")


def say(*, as_json: bool) -> None:
    """Through structlog, through logging, and an error with its trace."""
    logs.configure(as_json=as_json)
    log = structlog.get_logger("xdp-lb")
    log.info("listening", address="/run/xdp-lb/default/api.sock")
    logging.getLogger("uvicorn.error").warning("from %s", "uvicorn")
    try:
        fail(SECRET)
    except ZeroDivisionError:
        log.exception("internal error")


def test_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    say(as_json=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert "listening" in err
    assert "address=/run/xdp-lb/default/api.sock" in err
    assert "from uvicorn" in err
    assert "ZeroDivisionError: with 14 characters" in err


def test_an_object_a_line_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    say(as_json=True)
    listening, foreign, failed = map(json.loads, capsys.readouterr().err.splitlines())
    assert (listening["event"], listening["level"]) == ("listening", "info")
    assert (foreign["event"], foreign["level"]) == ("from uvicorn", "warning")
    assert failed["exception"].splitlines()[-1] == "ZeroDivisionError: with 14 characters"
    assert all(line["timestamp"].endswith("Z") for line in (listening, foreign, failed))


@pytest.mark.parametrize("as_json", [False, True])
def test_a_trace_shows_no_values_of_variables(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    say(as_json=as_json)
    err = capsys.readouterr().err
    assert "in fail" in err
    assert SECRET not in err
