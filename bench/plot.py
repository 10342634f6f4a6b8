"""A picture of what bench dataplane found: the cost of a packet against flows, and against backends, as SVG.

In come Results; out goes a file with a curve for each mode in two diagrams, its floor dashed. matplotlib is imported
only here, and only when a picture is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.report import BenchError, Result

DRAWN = {"family": "4", "packet": "ack", "transition": "0"}
SIZE = (10, 4)  # inches
DIAGRAMS = ("flows", "backends")


def require() -> None:
    """Raises BenchError where nothing can be drawn, before there is anything to draw."""
    if not find_spec("matplotlib"):
        raise BenchError("--plot: matplotlib is not installed: make setup does it")


def draw(over_flows: Iterable[Result], over_backends: Iterable[Result], file: Path) -> None:
    """Each list in a diagram of its own: their tables differ in size, so their figures do not compare."""
    figure = import_module("matplotlib.figure").Figure(figsize=SIZE, layout="constrained")
    for axes, along, results in zip(
        figure.subplots(1, 2, sharey=True), DIAGRAMS, (over_flows, over_backends), strict=True
    ):
        cases = [(pairs(result.case), result) for result in results]
        diagram(axes, along, [(case, result) for case, result in cases if is_drawn(case, along)])
    figure.savefig(file, format="svg")


def pairs(case: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in case.split())


def is_drawn(case: dict[str, str], along: str) -> bool:
    """Whether it is of the kind that is drawn, and varies in nothing but mode, flows and what the diagram varies."""
    return {name: value for name, value in case.items() if name not in {"mode", "flows", along}} == DRAWN


def diagram(axes: Any, along: str, points: list[tuple[dict[str, str], Result]]) -> None:
    for mode in dict.fromkeys(case["mode"] for case, _ in points):
        curve = sorted((int(case[along]), r.value, r.floor) for case, r in points if case["mode"] == mode)
        numbers, totals, floors = zip(*curve, strict=True)
        (line,) = axes.plot(numbers, totals, marker="o", label=f"mode {mode}")
        axes.plot(numbers, floors, linestyle="--", color=line.get_color(), label=f"its floor ({mode})")
    axes.set(xscale="log", xlabel=along, ylabel="ns a packet", ylim=(0, None))
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
