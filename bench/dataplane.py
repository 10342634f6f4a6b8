"""What the balancer costs a packet, in nanoseconds, without network or driver.

In come a mode, a kind of packet and a number of flows; out go the median times of one packet, with and without the
balancer. bench/dataplane.bpf.c makes the packets and calls the balancer within BPF_PROG_TEST_RUN; here its runs are
timed, and it is made sure that every timed packet was forwarded, and the way it was meant to be. Of the tunnel modes
the floor moves the start of the frame as far as they do, and in both the tunnel's headers are taken off again.

Flows are visited in an order that neither the caches nor the tables can foresee, all of them once before any is
visited again. The clock is the real one; the refresh of a flow's entry, due once a second, is put off, and measured by
itself as refresh=1. A SYN is always a new flow's; where it is recorded, in mode nat or in a slot in transition, the
tables, of `flows` entries, are then full, and it takes the place of an old one.

With transition=P that percentage of the slots waits for older flows, and all flows of these slots are recorded. Mode
nat, which records every flow in any case, looks at a slot only for a new one, and costs the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click

from bench import decap, plot, report
from bench.report import Result
from bench.rig import loaded
from bench.scenarios import MAIN_SCENARIOS, OTHER_SCENARIOS, Scenario
from bench.timing import timed

FLOWS_OVER_BACKENDS = 1 << 14  # nat has ports for no more than 31,744 towards a single backend
PLOTTED_FLOWS = (1, 1 << 8, 1 << 12, 1 << 14, 1 << 16, 1 << 18)
PLOTTED_BACKENDS = (1, 10, 100, 1000)
MAX_FLOWS = 1 << 20  # twice that is two thirds of the ports that nat has towards so many backends


def measure(scenario: Scenario, flow_counts: Sequence[int], repeat: int, rounds: int) -> Iterator[Result]:
    """A Result for each number of flows, all of them powers of two. Raises BenchError, XdpError."""
    measure_any = measure_new if scenario.packet == "syn" else measure_known
    yield from measure_any(scenario, flow_counts, repeat, rounds)


def measure_known(scenario: Scenario, flow_counts: Sequence[int], repeat: int, rounds: int) -> Iterator[Result]:
    most = max(flow_counts)
    with loaded(scenario, 2 * most) as rig:
        rig.open(most)
        rig.change()
        for flows in flow_counts:
            rig.settle(flows)
            yield timed(rig, scenario.case(flows), repeat, rounds)


def measure_new(scenario: Scenario, flow_counts: Sequence[int], repeat: int, rounds: int) -> Iterator[Result]:
    for flows in flow_counts:
        with loaded(scenario, flows) as rig:
            rig.change()
            rig.overflow()
            yield timed(rig, scenario.case(flows), repeat, rounds)


def powers_of_two(context: click.Context, parameter: click.Parameter, values: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(report.power_of_two(context, parameter, value) for value in values)


@report.command
@click.option(
    "--flows",
    "flow_counts",
    type=click.IntRange(1, MAX_FLOWS),
    multiple=True,
    default=(1, 1 << 16, MAX_FLOWS),
    show_default=True,
    callback=powers_of_two,
    help="How many flows take turns; may be repeated.",
)
@click.option("--repeat", type=click.IntRange(1), default=1 << 20, show_default=True, help="Packets of a timed run.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Timed runs of each case.")
@click.option(
    "--plot",
    "picture",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE.svg",
    help="Draw the cost against flows and against backends, of which it measures more then.",
)
def command(flow_counts: tuple[int, ...], repeat: int, rounds: int, picture: Path | None) -> Iterator[Result]:
    """What the balancer costs a packet, by mode, packet and number of flows."""
    if not picture:
        yield from measure_all(flow_counts, repeat, rounds)
        return
    plot.require()
    most = max(flow_counts)
    flow_counts = tuple(sorted({*flow_counts, *(flows for flows in PLOTTED_FLOWS if flows < most)}))
    across = min(most, FLOWS_OVER_BACKENDS)
    over_flows: list[Result] = []
    over_backends: list[Result] = []
    for result in measure_all(flow_counts, repeat, rounds):
        over_flows.append(result)
        yield result
    for result in measure_backends(across, repeat, rounds):
        over_backends.append(result)
        yield result
    plot.draw(over_flows, over_backends, picture)


def measure_all(flow_counts: Sequence[int], repeat: int, rounds: int) -> Iterator[Result]:
    for scenario in MAIN_SCENARIOS:
        yield from measure(scenario, flow_counts, repeat, rounds)
    for scenario in OTHER_SCENARIOS:
        yield from measure(scenario, [max(flow_counts)], repeat, rounds)
    yield from decap.measure_all(flow_counts, repeat, rounds)


def measure_backends(flows: int, repeat: int, rounds: int) -> Iterator[Result]:
    for scenario in MAIN_SCENARIOS:
        for backends in PLOTTED_BACKENDS:
            for result in measure(replace(scenario, backends=backends), [flows], repeat, rounds):
                yield replace(result, case=f"{scenario.case(flows)} backends={backends}")
