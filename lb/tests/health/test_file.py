"""What health checks have found, from one process to the next by a file: whole, or as if there were none."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from lb.health.file import HealthFile
from lb.health.state import Ramp, SavedHealth
from lb.model.conditions import Condition
from lb.model.health_check import HealthCheck
from lb.model.options import Options
from lb.model.state import Backend, Service
from lb.model.vip import Vip

WEB, OTHER = Vip.parse("10.0.0.1:80"), Vip.parse("[2001:db8::1]:0/udp@near")
A, B = "10.0.0.11:80", "10.0.0.12:80"
DOWN = SavedHealth("nat tcp", Condition(down=True, why='status "503"', since=1_700_000_000.25))
SLOW = SavedHealth("nat tcp", Condition(share=30, since=1_700_000_060), Ramp(1.5, 30, 10))
FOUND = {(WEB, A): DOWN, (WEB, B): SLOW, (OTHER, "[2001:db8::11]:53"): SavedHealth("ipip udp", Condition(since=7))}


@pytest.fixture
def file(tmp_path: Path) -> HealthFile:
    return HealthFile(tmp_path / "default" / "health.json")


def path_of(file: HealthFile) -> Path:
    return file._path


def without_age(file: HealthFile) -> dict[Any, SavedHealth]:
    return {key: SavedHealth(each.words, each.condition, each.ramp) for key, each in file.read().items()}


def test_what_is_written_is_read_back_by_the_next_process(file: HealthFile) -> None:
    file.write(FOUND)
    assert without_age(HealthFile(path_of(file))) == FOUND
    file.write({})
    assert file.read() == {}
    assert [each.name for each in path_of(file).parent.iterdir()] == ["health.json"]


def test_it_is_as_old_as_the_last_sign_of_life(file: HealthFile) -> None:
    file.write(FOUND)
    long_ago = time.time() - 1000
    os.utime(path_of(file), (long_ago, long_ago))
    assert all(1000 <= each.age_s < 1060 for each in file.read().values())
    file.touch()
    assert all(0 <= each.age_s < 60 for each in file.read().values())


def test_without_a_file_nothing_is_remembered_and_a_sign_of_life_is_none(file: HealthFile) -> None:
    file.touch()
    assert file.read() == {}
    assert not path_of(file).exists()


def test_of_another_boot_nothing_is_believed(file: HealthFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file.write(FOUND)
    other = tmp_path / "boot_id"
    other.write_text("00000000-0000-0000-0000-000000000000\n")
    monkeypatch.setattr("lb.health.file.BOOT_ID", other)
    assert file.read() == {}


@pytest.mark.parametrize("length", range(0, 400, 7))
def test_a_file_that_is_cut_short_is_as_none(file: HealthFile, length: int) -> None:
    file.write(FOUND)
    whole = path_of(file).read_bytes()
    assert length < len(whole)
    path_of(file).write_bytes(whole[:length])
    assert file.read() == {}


SENSELESS: list[tuple[str, Any]] = [
    ("share", 0),
    ("share", 101),
    ("share", None),
    ("since", "yesterday"),
    ("ramp", [1.0, 0, 10]),
    ("ramp", [1e12, 30, 10]),  # it would never begin
    ("ramp", [1.0, 30, 0]),
    ("ramp", [1.0, 30]),
    ("ramp", 3),
]


@pytest.mark.parametrize(("name", "value"), SENSELESS)
def test_a_file_that_makes_no_sense_is_as_none(file: HealthFile, name: str, value: Any) -> None:
    file.write(FOUND)
    document = json.loads(path_of(file).read_text())
    document["services"][0]["backends"][B][name] = value
    path_of(file).write_text(json.dumps(document))
    assert file.read() == {}


@pytest.mark.parametrize("text", ["", "null", "[]", "7", "{}", '{"boot_id": "x"}', "\0"])
def test_a_file_of_something_else_is_as_none(file: HealthFile, text: str) -> None:
    file.write(FOUND)
    path_of(file).write_text(text)
    assert file.read() == {}


def test_conditions_are_of_services_that_are_checked_and_say_since_when_nobody_does(file: HealthFile) -> None:
    file.write(FOUND)
    web = Service(WEB, backends=(Backend.parse(A),), options=Options(health=HealthCheck.parse("tcp")))
    conditions = file.conditions([web, Service(Vip.parse("10.0.0.3:80"), backends=web.backends)])
    assert conditions.keys() == {WEB}
    assert conditions[WEB][B] == SLOW.condition
    assert conditions[WEB][A].why.startswith('status "503"; not checked since 20')
    assert conditions[WEB][A].down
    assert file.conditions([Service(WEB, backends=web.backends)]) == {}
