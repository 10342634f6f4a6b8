"""The balancer's program, loaded for test runs in the namespace of a balancer without backends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from netns_tests.bed.topology import Bed
from netns_tests.oracle import generator
from netns_tests.oracle.program import LoadedProgram, loaded_program
from netns_tests.oracle.table import SETTINGS, Balancer


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    """Its balancer does not route, so that no one resolves a member but the test, which runs in there."""
    with Bed(backends=0) as bed, bed.lb.entered():
        yield bed


@pytest.fixture(scope="module")
def interfaces(bed: Bed) -> tuple[int, int]:
    with bed.lb.netlink() as ip:
        front, back = (ip.link_lookup(ifname=interface.name)[0] for interface in bed.lb.interfaces)
    return front, back


@pytest.fixture(scope="module")
def program(bed: Bed) -> Iterator[LoadedProgram]:
    with loaded_program(SETTINGS) as program:
        yield program


@pytest.fixture
def balancer(program: LoadedProgram, interfaces: tuple[int, int]) -> Balancer:
    return Balancer(program, *interfaces)


@pytest.fixture
def balancer_with_ports(interfaces: tuple[int, int]) -> Iterator[Callable[[int], Balancer]]:
    """A factory of balancers whose nat has only so many ports, from 2000 on."""
    with contextlib.ExitStack() as programs:
        yield lambda count: Balancer(
            programs.enter_context(loaded_program(replace(SETTINGS, nat_port_count=count))), *interfaces
        )


@pytest.fixture(scope="module")
def drawn_program(bed: Bed) -> Iterator[LoadedProgram]:
    """For the worlds of oracle.generator, on one CPU: what is limited by the second is so on each."""
    home = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(home)})
    with loaded_program(generator.SETTINGS) as program:
        yield program
    os.sched_setaffinity(0, home)
