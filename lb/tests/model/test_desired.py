"""A configuration file over what is served."""

from __future__ import annotations

from dataclasses import replace

from lb.model.desired import Desired, Given, Merged
from lb.model.state import Backend, Service
from lb.model.vip import Vip

VIP = Vip.parse("10.0.0.1:80")
A, B = Backend.parse("10.0.0.11:80"), Backend.parse("10.0.0.12:80")
FILE = Service(VIP, backends=(A, B))
CHANGED = Service(VIP, backends=(replace(A, weight=5, draining=True), B))
WHERE = "10.0.0.1:80/tcp: backend 10.0.0.11:80"


def test_what_the_file_does_not_give_stays_as_it_is_served() -> None:
    assert Desired((FILE,)).over([CHANGED]) == Merged(
        (CHANGED,),
        kept=(
            f"{WHERE}: weight 5 kept: weight is not in the file",
            f"{WHERE}: draining kept: drain is not in the file",
        ),
    )


def test_what_the_file_gives_overrides_what_is_served() -> None:
    given: Given = {(VIP, str(A)): {"weight", "draining"}}
    assert Desired((FILE,), given).over([CHANGED]) == Merged(
        (FILE,),
        overridden=(
            f"{WHERE}: weight 5 -> weight 1: given by the file",
            f"{WHERE}: draining -> active: given by the file",
        ),
    )


def test_each_key_is_decided_by_itself() -> None:
    merged = Desired((FILE,), {(VIP, str(A)): {"weight"}}).over([CHANGED])
    assert merged.services == (Service(VIP, backends=(replace(A, draining=True), B)),)
    assert (len(merged.kept), len(merged.overridden)) == (1, 1)


def test_what_is_not_served_yet_is_as_the_file_has_it() -> None:
    other = Service(Vip.parse("10.0.0.1:81"), backends=(A,))
    added = replace(FILE, backends=(A, B, Backend.parse("10.0.0.13:80")))
    merged = Desired((added, other)).over([FILE])
    assert merged == Merged((added, other))
    assert merged.services[0] is added
